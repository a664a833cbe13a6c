"""Which workers take a run: least loaded, with affinity among those that are nearly so.

A worker's load is what it reported or what this router itself has given it, whichever is more: reports lag by an
interval. All workers whose load is within a slack of the lowest count as equal, and rendezvous hashing by the request's
key picks among them, so conversations and shared prompts return to the worker whose prefix cache knows them, and adding
a worker moves only the keys that it wins.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from router.config import RouterConfig
from router.errors import RequestError
from router.worker_client import WorkerClient


@dataclass(frozen=True, slots=True)
class Route:
    """prefill None: `decode` computes the prompt itself. decode None: one token only, no KV moves."""

    prefill: WorkerClient | None
    decode: WorkerClient | None


@dataclass(frozen=True, slots=True)
class Need:
    """What a run asks of its workers, as far as routing cares."""

    key: bytes
    num_tokens: int  # to prefill
    num_sequences: int
    first_token_only: bool  # max_tokens is reached by the first token


def affinity_key(session_id: str, token_ids: Sequence[int], num_tokens: int) -> bytes:
    """The session's name, else the prompt's first tokens."""
    if session_id:
        return b"s" + session_id.encode()
    return b"t" + b"".join(i.to_bytes(4, "little") for i in token_ids[:num_tokens])


def choose(workers: Sequence[WorkerClient], need: Need, config: RouterConfig, avoid: frozenset[str]) -> Route | None:
    """The route for a run, None while no healthy workers make one. Workers in `avoid` only if there are no others.

    RequestError: KV_CACHE_EXHAUSTED if no healthy worker's pool can ever hold it, INCOMPATIBLE_WORKERS if no pair's
    layouts agree.
    """
    healthy = [w for w in workers if w.takes_work]
    roomy = [w for w in healthy if _blocks_needed(w, need) <= _num_blocks(w)]
    route = _choose(_unless_alone(roomy, avoid), need, config)
    if route is None and len(roomy) < len(healthy) and _choose(healthy, need, config) is not None:
        small = [w for w in healthy if w not in roomy]
        largest = max(small, key=_num_blocks)
        raise RequestError(
            pb.ERROR_REASON_KV_CACHE_EXHAUSTED,
            f"the prompt of {need.num_tokens} tokens with {need.num_sequences} sequences needs"
            f" {_blocks_needed(largest, need)} KV blocks; worker {largest.worker_id!r} has {_num_blocks(largest)}",
        )
    return route


def _unless_alone(workers: Sequence[WorkerClient], avoid: frozenset[str]) -> list[WorkerClient]:
    """Without those to avoid, but a role that only they have keeps them."""
    others = {w.member.role for w in workers if w.worker_id not in avoid}
    return [w for w in workers if w.worker_id not in avoid or w.member.role not in others]


def _choose(healthy: Sequence[WorkerClient], need: Need, config: RouterConfig) -> Route | None:
    prefills = [w for w in healthy if w.can_prefill]
    if need.first_token_only and prefills:
        return Route(_pick(prefills, prompt_load, _prompt_slack(need, config), need.key), None)
    decodes = [w for w in healthy if w.can_decode]
    pair = _pick_pair(prefills, decodes, need, config) if prefills and decodes else None
    both = [w for w in healthy if w.is_colocated]
    if not both:
        return pair
    alone = _pick(both, sequence_load, config.decode_slack_sequences, need.key)
    if pair is None or pair.decode is None:
        return Route(None, alone)
    is_idler = sequence_load(alone) + config.decode_slack_sequences < sequence_load(pair.decode)
    return Route(None, alone) if is_idler else pair


def _pick_pair(
    prefills: list[WorkerClient], decodes: list[WorkerClient], need: Need, config: RouterConfig
) -> Route | None:
    layouts = {_layout(w) for w in prefills} & {_layout(w) for w in decodes}
    if not layouts:
        raise RequestError(pb.ERROR_REASON_INCOMPATIBLE_WORKERS, _mismatch(prefills[0], decodes[0]))
    matching = [w for w in decodes if _layout(w) in layouts]
    decode = _pick(matching, sequence_load, config.decode_slack_sequences, need.key)
    peers = [w for w in prefills if _layout(w) == _layout(decode)]
    return Route(_pick(peers, prompt_load, _prompt_slack(need, config), need.key), decode)


def _prompt_slack(need: Need, config: RouterConfig) -> int:
    """Waiting for a worker that may know the prompt pays only while the wait is shorter than computing it."""
    return min(config.prefill_slack_tokens, need.num_tokens // 2)


def prompt_load(worker: WorkerClient) -> int:
    """Prompt tokens queued at a prefill worker."""
    return max(worker.queued_prompt_tokens, worker.load.num_waiting_tokens)


def sequence_load(worker: WorkerClient) -> int:
    """Sequences running or waiting at a decode worker."""
    return max(worker.num_sequences, worker.load.num_running + worker.load.num_waiting)


def _pick(workers: list[WorkerClient], load: Callable[[WorkerClient], int], slack: int, key: bytes) -> WorkerClient:
    lowest = min(load(w) for w in workers)
    near = [w for w in workers if load(w) <= lowest + slack]
    return near[0] if len(near) == 1 else max(near, key=lambda w: _score(key, w.worker_id))


def _score(key: bytes, worker_id: str) -> bytes:
    return hashlib.blake2b(key, digest_size=8, key=worker_id.encode()[:64]).digest()


def _num_blocks(worker: WorkerClient) -> int:
    return worker.info.total_kv_blocks if worker.info is not None else 0


def _blocks_needed(worker: WorkerClient, need: Need) -> int:
    """The least that the run must hold at once: its prompt, and where it decodes a next token for each sequence."""
    size = max(1, worker.info.layout.block_size if worker.info is not None else 1)
    if worker.can_prefill or need.first_token_only:
        return -(-need.num_tokens // size)
    shared = need.num_tokens // size
    return shared + need.num_sequences * (-(-(need.num_tokens + 1) // size) - shared)


def _layout(worker: WorkerClient) -> tuple[str, str]:
    assert worker.info is not None, "a ready worker has said who it is"
    return worker.info.layout.fingerprint, worker.info.transport


def _mismatch(prefill: WorkerClient, decode: WorkerClient) -> str:
    assert prefill.info is not None and decode.info is not None
    return (
        f"no prefill worker can hand its KV to a decode worker: {prefill.worker_id!r} has {_words(prefill.info)},"
        f" {decode.worker_id!r} has {_words(decode.info)}"
    )


def _words(info: wpb.GetWorkerResponse) -> str:
    layout = info.layout
    return (
        f"model {layout.model!r} {layout.dtype} block size {layout.block_size} layout {layout.fingerprint[:12]}"
        f" transport {info.transport!r}"
    )
