"""GenerateRequest to Accepted: the one validator of every front end, before anything is reserved anywhere.

Two steps, because tokenizing a long prompt happens in a thread between them: `parse` checks all that needs no tokens,
`accept` the rest. Each refusal is an InvalidRequest (or RequestError) that names the field, its value and what is
allowed. Wire facts: a negative uint32 arrives as a huge number, floats may be NaN or infinite.
"""

import math
import re
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from protos import inference_pb2 as pb
from router.config import Limits
from router.errors import InvalidRequest, RequestError, clip
from router.model import Model

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
_CACHE_SALT = re.compile(r"[A-Za-z0-9_=+/-]{0,128}\Z")
_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
MAX_SESSION_ID_BYTES = 256
MAX_STOP_BYTES = 256
MAX_PRIORITY = 1000
# Below this, dividing logits by the temperature is greedy up to overflow.
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request whose fields are in range; its prompt is not tokenized yet. `sampling` is resolved but for the seed."""

    request: pb.GenerateRequest
    request_id: str
    sampling: pb.SamplingParams


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request as the pipeline runs it. Every field of `sampling` and `stopping` is set, the seed included."""

    request_id: str
    model: str
    token_ids: tuple[int, ...]
    sampling: pb.SamplingParams
    stopping: pb.StoppingCriteria  # stop strings included; workers do not get those
    logprobs: int | None
    want_text: bool
    want_token_ids: bool
    want_prompt_token_ids: bool
    cache_namespace: bytes
    bypass_prefix_cache: bool
    priority: int
    session_id: str

    @property
    def num_sequences(self) -> int:
        return self.sampling.num_sequences


def parse(request: pb.GenerateRequest, model: Model, limits: Limits) -> Parsed:
    """Everything that can be refused without tokenizing."""
    if request.request_id and not _REQUEST_ID.match(request.request_id):
        raise InvalidRequest("request_id", f"is {clip(request.request_id)}; allowed is [A-Za-z0-9._:-]{{1,128}}")
    check_model(request.model, model)
    check_prompt(request, model.vocab_size)
    sampling = _sampling(request.sampling, model, limits)
    _check_stopping(request.stopping, model.vocab_size, limits)
    if request.response.HasField("logprobs") and request.response.logprobs > limits.max_logprobs:
        raise InvalidRequest("response.logprobs", _outside(request.response.logprobs, 0, limits.max_logprobs))
    if not _CACHE_SALT.match(request.cache.cache_salt):
        raise InvalidRequest(
            "cache.cache_salt", f"is {clip(request.cache.cache_salt)}; allowed is [A-Za-z0-9_=+/-]{{0,128}}"
        )
    if abs(request.priority) > MAX_PRIORITY:
        raise InvalidRequest("priority", _outside(request.priority, -MAX_PRIORITY, MAX_PRIORITY))
    num_bytes = len(request.session_id.encode())
    if num_bytes > MAX_SESSION_ID_BYTES:
        raise InvalidRequest("session_id", f"has {num_bytes} bytes; at most {MAX_SESSION_ID_BYTES} are allowed")
    return Parsed(request, request.request_id or f"gen-{secrets.token_hex(12)}", sampling)


def accept(parsed: Parsed, token_ids: Sequence[int], model: Model, max_model_len: int) -> Accepted:
    """Checks what depends on the prompt's length, and fills in what the client left open."""
    request = parsed.request
    kind = request.WhichOneof("prompt") or "prompt"
    if not token_ids:
        raise InvalidRequest(kind, "the prompt is empty; at least 1 token is needed")
    check_length(kind, len(token_ids), max_model_len)
    room = max_model_len - len(token_ids)
    stopping = pb.StoppingCriteria()
    stopping.CopyFrom(request.stopping)
    if not stopping.HasField("max_tokens"):
        stopping.max_tokens = room
    if not 1 <= stopping.max_tokens <= room:
        raise InvalidRequest(
            "stopping.max_tokens",
            f"{_outside(stopping.max_tokens, 1, room)}"
            f" (max_model_len {max_model_len} less the prompt's {len(token_ids)} tokens)",
        )
    if not stopping.HasField("min_tokens"):
        stopping.min_tokens = 0
    if stopping.min_tokens > stopping.max_tokens:
        raise InvalidRequest("stopping.min_tokens", f"{_outside(stopping.min_tokens, 0, stopping.max_tokens)}")
    sampling = parsed.sampling
    if not sampling.HasField("seed"):
        sampling.seed = secrets.randbits(64)
    response = request.response
    return Accepted(
        request_id=parsed.request_id,
        model=model.name,
        token_ids=tuple(token_ids),
        sampling=sampling,
        stopping=stopping,
        logprobs=response.logprobs if response.HasField("logprobs") else None,
        want_text=response.text if response.HasField("text") else True,
        want_token_ids=response.token_ids,
        want_prompt_token_ids=response.prompt_token_ids,
        cache_namespace=request.cache.cache_salt.encode(),
        bypass_prefix_cache=request.cache.bypass_prefix_cache,
        priority=request.priority,
        session_id=request.session_id,
    )


def check_length(field: str, num_tokens: int, max_model_len: int, at_least: bool = False) -> None:
    """`at_least`: `num_tokens` is a lower bound, known before a long text is tokenized."""
    if num_tokens > max_model_len - 1:
        raise InvalidRequest(
            field,
            f"the prompt has {'at least ' if at_least else ''}{num_tokens} tokens; allowed is [1, {max_model_len - 1}]"
            f" (max_model_len {max_model_len} less one token to generate)",
            pb.ERROR_REASON_PROMPT_TOO_LONG,
        )


def check_model(name: str, model: Model) -> None:
    if name and name != model.name:
        raise RequestError(pb.ERROR_REASON_MODEL_NOT_FOUND, f"model {clip(name)} is not served; it is {model.name!r}")


def check_prompt(request: pb.GenerateRequest, vocab_size: int) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt", "is missing; set one of text, token_ids, chat")
    if kind == "text" and not request.text:
        raise InvalidRequest("text", "the prompt is empty; at least 1 token is needed")
    if kind == "token_ids":
        check_token_ids("token_ids.ids", request.token_ids.ids, vocab_size)
    if kind == "chat":
        check_chat("chat", request.chat)


def check_chat(field: str, chat: pb.ChatPrompt) -> None:
    if not chat.messages:
        raise InvalidRequest(f"{field}.messages", "is empty; at least 1 message is needed")
    for i, message in enumerate(chat.messages):
        if not _ROLE.match(message.role):
            raise InvalidRequest(
                f"{field}.messages[{i}].role", f"is {clip(message.role)}; allowed is [A-Za-z0-9_.-]{{1,64}}"
            )


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if token_ids and max(token_ids) >= vocab_size:
        i = next(i for i, token_id in enumerate(token_ids) if token_id >= vocab_size)
        raise InvalidRequest(
            f"{field}[{i}]", f"{_outside(token_ids[i], 0, vocab_size - 1)} (the vocabulary has {vocab_size} tokens)"
        )


def _sampling(asked: pb.SamplingParams, model: Model, limits: Limits) -> pb.SamplingParams:
    sampling = pb.SamplingParams()
    sampling.CopyFrom(model.defaults)
    sampling.MergeFrom(asked)
    _check_float(sampling, "temperature", 0, 2)
    _check_float(sampling, "top_p", 0, 1, open_below=True)
    _check_float(sampling, "min_p", 0, 1)
    _check_float(sampling, "presence_penalty", -2, 2)
    _check_float(sampling, "frequency_penalty", -2, 2)
    _check_float(sampling, "repetition_penalty", 0, 10, open_below=True)
    if sampling.top_k < -1:
        raise InvalidRequest("sampling.top_k", f"is {sampling.top_k}; allowed is at least 1, or 0 or -1 to disable")
    if not 1 <= sampling.num_sequences <= limits.max_num_sequences:
        raise InvalidRequest("sampling.num_sequences", _outside(sampling.num_sequences, 1, limits.max_num_sequences))
    if len(sampling.logit_bias) > limits.max_logit_bias_entries:
        raise InvalidRequest(
            "sampling.logit_bias",
            f"has {len(sampling.logit_bias)} entries; at most {limits.max_logit_bias_entries} are allowed",
        )
    for token_id, bias in sampling.logit_bias.items():
        field = f"sampling.logit_bias[{token_id}]"
        if token_id >= model.vocab_size:
            raise InvalidRequest(
                field, f"is for token id {token_id}; allowed is [0, {model.vocab_size - 1}] (the vocabulary's ids)"
            )
        if not -100 <= bias <= 100:
            raise InvalidRequest(field, _outside(bias, -100, 100))
    if sampling.temperature < GREEDY_TEMPERATURE:
        sampling.temperature = 0
    if sampling.top_k < 0 or sampling.top_k >= model.vocab_size:
        sampling.top_k = 0
    return sampling


def _check_float(
    sampling: pb.SamplingParams, name: str, lowest: float, highest: float, open_below: bool = False
) -> None:
    value = getattr(sampling, name)
    if not math.isfinite(value) or not lowest <= value <= highest or (open_below and value == lowest):
        raise InvalidRequest(f"sampling.{name}", _outside(value, lowest, highest, open_below))


def _check_stopping(stopping: pb.StoppingCriteria, vocab_size: int, limits: Limits) -> None:
    if stopping.HasField("max_tokens") and stopping.max_tokens == 0:
        raise InvalidRequest("stopping.max_tokens", "is 0; at least 1 is needed")
    if len(stopping.stop) > limits.max_stop_strings:
        raise InvalidRequest(
            "stopping.stop", f"has {len(stopping.stop)} strings; at most {limits.max_stop_strings} are allowed"
        )
    for i, stop in enumerate(stopping.stop):
        num_bytes = len(stop.encode())
        if not 1 <= num_bytes <= MAX_STOP_BYTES:
            raise InvalidRequest(
                f"stopping.stop[{i}]", f"has {num_bytes} bytes; allowed is [1, {MAX_STOP_BYTES}] bytes of UTF-8"
            )
    if len(stopping.stop_token_ids) > limits.max_stop_token_ids:
        raise InvalidRequest(
            "stopping.stop_token_ids",
            f"has {len(stopping.stop_token_ids)} ids; at most {limits.max_stop_token_ids} are allowed",
        )
    check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids, vocab_size)


def _outside(value: float, lowest: float, highest: float, open_below: bool = False) -> str:
    said = _shortest(value) if isinstance(value, float) else str(value)
    return f"is {said}; allowed is {'(' if open_below else '['}{lowest}, {highest}]"


def _shortest(value: float) -> str:
    """The fewest digits that name this single-precision value: 2.1, not 2.0999999."""
    wanted = struct.pack("f", value)
    return next(
        (text for text in (f"{value:.{n}g}" for n in range(6, 9)) if struct.pack("f", float(text)) == wanted),
        f"{value:.9g}",
    )
