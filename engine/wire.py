"""Engine vocabulary to and from protos: the one place where field names meet."""

import hashlib
from array import array
from collections.abc import Sequence

from engine.request import Finish, FinishReason, Request, SamplingParams, Token, TokenLogprob
from protos import inference_pb2, worker_pb2

_FINISH = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


def request_id(run_id: str, attempt: int) -> str:
    """The engine's name for one attempt of a run."""
    return f"{run_id}:{attempt}"


def request_from_pb(message: worker_pb2.EngineRequest) -> Request:
    """Raises ValueError naming the field where the engine's own limits are broken."""
    sampling, stopping = message.sampling, message.stopping
    return Request(
        id=request_id(message.run_id, message.attempt),
        token_ids=tuple(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=max(sampling.top_k, 0),
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            num_sequences=sampling.num_sequences,
            logit_bias=dict(sampling.logit_bias),
            max_tokens=stopping.max_tokens,
            min_tokens=stopping.min_tokens,
            stop_token_ids=frozenset(stopping.stop_token_ids),
            ignore_eos=stopping.ignore_eos,
            logprobs=message.logprobs if message.HasField("logprobs") else None,
        ),
        priority=message.priority,
        namespace=message.cache_namespace,
        use_prefix_cache=not message.bypass_prefix_cache,
    )


def token_hash(token_ids: Sequence[int]) -> bytes:
    """SHA-256 over the tokens as uint32 little-endian: what a commit says its KV is of."""
    return hashlib.sha256(array("I", token_ids).tobytes()).digest()


def finish_to_pb(index: int, finish: Finish, seed: int) -> inference_pb2.FinishInfo:
    info = inference_pb2.FinishInfo(index=index, finish_reason=_FINISH[finish.reason], seed=seed)
    if finish.eos_token_id is not None:
        info.eos_token_id = finish.eos_token_id
    elif finish.stop_token_id is not None:
        info.stop_token_id = finish.stop_token_id
    return info


def logprob_to_pb(logprob: TokenLogprob) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        rank=logprob.rank,
        top=[logprob_to_pb(other) for other in logprob.top],
    )


def first_token_to_pb(token: Token, seed: int) -> worker_pb2.FirstToken:
    message = worker_pb2.FirstToken(token_id=token.token_id)
    if token.logprob is not None:
        message.logprob.CopyFrom(logprob_to_pb(token.logprob))
    if token.finish is not None:
        message.finish_info.CopyFrom(finish_to_pb(token.sequence_index, token.finish, seed))
    return message
