"""Which workers take a run: decode workers with free pages first, least loaded, with affinity among those nearly so.

A worker's load is what it reported or what this router itself has given it, whichever is more: reports lag by an
interval. A decode worker has room if its free pages, less those promised to runs on their way there, take the prompt
and a next token, and nothing waits there; those without are used only if all are. All workers whose load is within a
slack of the lowest count as equal, and rendezvous hashing by the request's key picks among them, so conversations and
shared prompts return to the worker whose prefix cache knows them, and adding a worker moves only the keys that it wins.
Of prefill workers those equals are left out whose link to the decode worker is far slower than another's.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from router.config import RouterConfig
from router.errors import RequestError
from router.worker_client import WorkerClient

SLOW_LINK = 4  # so many times slower than another; two measurements of one kind of link differ by less


@dataclass(frozen=True, slots=True)
class Route:
    """prefill None: `decode` computes the prompt itself. decode None: one token only, no KV moves."""

    prefill: WorkerClient | None
    decode: WorkerClient | None
    has_other_decode: bool = False  # which could take the run instead


@dataclass(frozen=True, slots=True)
class Need:
    """What a run asks of its workers, as far as routing cares."""

    key: bytes
    num_tokens: int  # to prefill
    num_total_tokens: int  # of one sequence at its longest, prompt included
    num_sequences: int
    first_token_only: bool  # max_tokens is reached by the first token


def choose(
    workers: Sequence[WorkerClient],
    need: Need,
    config: RouterConfig,
    avoid: frozenset[str],
    full: frozenset[str] = frozenset(),
) -> Route | None:
    """The route for a run, None while no healthy workers make one. Workers in `avoid` only if there are no others.

    Those in `full` count as without room, whatever they report. RequestError: KV_CACHE_EXHAUSTED if no healthy worker's
    pool can ever hold it, INCOMPATIBLE_WORKERS if no pair's layouts agree.
    """
    healthy = [w for w in workers if w.takes_work]
    able = [w for w in healthy if _blocks_needed(w, need) <= _num_blocks(w)]
    route = _choose(_unless_alone(able, avoid), need, config, full)
    if route is None and len(able) < len(healthy) and _choose(healthy, need, config, full) is not None:
        largest = max((w for w in healthy if w not in able), key=_num_blocks)
        raise RequestError(
            pb.ERROR_REASON_KV_CACHE_EXHAUSTED,
            f"the prompt of {need.num_tokens} tokens with {need.num_sequences} sequences of up to"
            f" {need.num_total_tokens} tokens, prompt included, needs {_blocks_needed(largest, need)} KV blocks;"
            f" worker {largest.worker_id!r} has {_num_blocks(largest)}",
        )
    return route


def _unless_alone(workers: Sequence[WorkerClient], avoid: frozenset[str]) -> list[WorkerClient]:
    """Without those to avoid, but a role that only they have keeps them."""
    others = {w.member.role for w in workers if w.worker_id not in avoid}
    return [w for w in workers if w.worker_id not in avoid or w.member.role not in others]


def _choose(healthy: Sequence[WorkerClient], need: Need, config: RouterConfig, full: frozenset[str]) -> Route | None:
    prefills = [w for w in healthy if w.can_prefill]
    if need.first_token_only and prefills:
        return Route(_pick(prefills, prompt_load, _prompt_slack(need, config), need.key), None)
    decodes = [w for w in healthy if w.can_decode]
    pair = _pick_pair(prefills, decodes, need, config, full) if prefills and decodes else None
    both = [w for w in healthy if w.is_colocated]
    if not both:
        return pair
    alone = _pick_decode(both, need, config, full)
    if pair is None or pair.decode is None:
        return Route(None, alone)
    has_room = [_has_room(w, need, full) for w in (alone, pair.decode)]
    is_idler = sequence_load(alone) + config.decode_slack_sequences < sequence_load(pair.decode)
    goes_alone = is_idler if has_room[0] == has_room[1] else has_room[0]
    return Route(None, alone) if goes_alone else Route(pair.prefill, pair.decode, has_other_decode=True)


def _pick_pair(
    prefills: list[WorkerClient],
    decodes: list[WorkerClient],
    need: Need,
    config: RouterConfig,
    full: frozenset[str],
) -> Route | None:
    given = set().union(*map(_given, prefills))
    matching = [w for w in decodes if _layout(w) in given]
    if not matching:
        raise RequestError(pb.ERROR_REASON_INCOMPATIBLE_WORKERS, _mismatch(prefills[0], decodes[0]))
    decode = _pick_decode(matching, need, config, full)
    peers = [w for w in prefills if _layout(decode) in _given(w)]
    near = _near(peers, prompt_load, _prompt_slack(need, config))
    prefill = _keyed(_not_slow(near, decode), need.key)
    return Route(prefill, decode, has_other_decode=len(matching) > 1)


def _pick_decode(workers: list[WorkerClient], need: Need, config: RouterConfig, full: frozenset[str]) -> WorkerClient:
    roomy = [w for w in workers if _has_room(w, need, full)]
    return _pick(roomy or workers, sequence_load, config.decode_slack_sequences, need.key)


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
    return _keyed(_near(workers, load, slack), key)


def _near(workers: list[WorkerClient], load: Callable[[WorkerClient], int], slack: int) -> list[WorkerClient]:
    lowest = min(load(w) for w in workers)
    return [w for w in workers if load(w) <= lowest + slack]


def _not_slow(prefills: list[WorkerClient], decode: WorkerClient) -> list[WorkerClient]:
    """Without those whose link to `decode` was measured, and another's is several times as fast: on one host with it,
    say, where they are not. Who has not been measured may be as fast as any."""
    speeds = [next((one.gb_per_s for one in w.load.links if one.worker_id == decode.worker_id), 0.0) for w in prefills]
    return [w for w, speed in zip(prefills, speeds, strict=True) if not speed or speed * SLOW_LINK >= max(speeds)]


def _keyed(near: list[WorkerClient], key: bytes) -> WorkerClient:
    return near[0] if len(near) == 1 else max(near, key=lambda w: _score(key, w.worker_id))


def _score(key: bytes, worker_id: str) -> bytes:
    return hashlib.blake2b(key, digest_size=8, key=worker_id.encode()[:64]).digest()


def _num_blocks(worker: WorkerClient) -> int:
    return worker.info.total_kv_blocks if worker.info is not None else 0


def _has_room(worker: WorkerClient, need: Need, full: frozenset[str]) -> bool:
    load = worker.load
    on_their_way = max(0, worker.promised_blocks - load.reserved_blocks)
    is_queueing = worker.can_decode and load.num_waiting > 0  # of colocated ones also prompts wait, which is no sign
    fits = blocks_at_start(worker, need.num_tokens, need.num_sequences) <= load.free_blocks - on_their_way
    return fits and not is_queueing and worker.worker_id not in full


def blocks_at_start(worker: WorkerClient, num_tokens: int, num_sequences: int) -> int:
    """What a run holds where it begins to decode: its prompt, and a next token for each sequence."""
    size = _block_size(worker)
    shared = num_tokens // size
    return shared + num_sequences * (-(-(num_tokens + 1) // size) - shared)


def _blocks_needed(worker: WorkerClient, need: Need) -> int:
    """The least that the run must be able to hold at once, to its end. Sequences may grow one after the other, and the
    last token is never written."""
    size = _block_size(worker)
    if worker.can_prefill or need.first_token_only:
        return -(-need.num_tokens // size)
    longest = (worker.info.model.max_model_len if worker.info is not None else 0) or need.num_total_tokens
    at_end = -(-(min(need.num_total_tokens, longest) - 1) // size)
    return max(blocks_at_start(worker, need.num_tokens, need.num_sequences), at_end)


def _block_size(worker: WorkerClient) -> int:
    return max(1, worker.info.layout.block_size if worker.info is not None else 1)


def _layout(worker: WorkerClient) -> tuple[str, str]:
    assert worker.info is not None, "a ready worker has said who it is"
    return worker.info.layout.fingerprint, worker.info.transport


def _given(worker: WorkerClient) -> set[tuple[str, str]]:
    """The layouts that a prefill worker can hand over: its own, and that rounded to float8 on the way."""
    fingerprint, transport = _layout(worker)
    assert worker.info is not None
    rounded = worker.info.layout.float8_fingerprint
    return {(fingerprint, transport), (rounded, transport)} if rounded else {(fingerprint, transport)}


def _mismatch(prefill: WorkerClient, decode: WorkerClient) -> str:
    assert prefill.info is not None and decode.info is not None
    return (
        f"no prefill worker can hand its KV to a decode worker: {prefill.worker_id!r} has {_words(prefill.info)},"
        f" {decode.worker_id!r} has {_words(decode.info)}"
    )


def _words(info: wpb.GetWorkerResponse) -> str:
    layout = info.layout
    return (
        f"model {layout.model!r} {layout.dtype} KV {layout.kv_dtype} block size {layout.block_size}"
        f" layout {layout.fingerprint[:12]} transport {info.transport!r}"
    )
