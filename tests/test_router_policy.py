"""Which workers a run gets: load first, affinity among equals, roles, pools too small, workers to avoid."""

from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from router.affinity import Affinity, affinity_key
from router.config import RouterConfig
from router.errors import RequestError
from router.policy import Need, Route, choose
from router.worker_client import Connection, WorkerClient

CONFIG = RouterConfig("m", prefill_slack_tokens=1000, decode_slack_sequences=2)
ROLES = {"p": wpb.WORKER_ROLE_PREFILL, "d": wpb.WORKER_ROLE_DECODE, "b": wpb.WORKER_ROLE_BOTH}
Make = Callable[..., WorkerClient]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Clients that never connect; their state is set by hand. The name's first letter is the role."""
    made = []

    def build(name: str, blocks: int = 100, layout: str = "same", **load: Any) -> WorkerClient:
        member = wpb.Member(worker_id=name, incarnation="i", address="127.0.0.1:1", role=ROLES[name[0]])
        member.state = wpb.WORKER_STATE_READY
        client = WorkerClient(member, CONFIG, lambda: None)
        client.connection = Connection.READY
        client.load = wpb.WorkerLoad(state=wpb.WORKER_STATE_READY, **load)
        client.info = wpb.GetWorkerResponse(total_kv_blocks=blocks)
        client.info.layout.block_size = 16
        client.info.layout.fingerprint = layout
        made.append(client)
        return client

    yield build
    for client in made:
        await client.close("the test ends")


def need(
    key: str = "k", num_tokens: int = 100, n: int = 1, first_token_only: bool = False, total: int | None = None
) -> Need:
    return Need(affinity_key(key, (), 1), num_tokens, total or num_tokens + 2, n, first_token_only)


def names(route: Route | None) -> tuple[str | None, str | None]:
    assert route is not None
    return (route.prefill.worker_id if route.prefill else None, route.decode.worker_id if route.decode else None)


NOBODY: frozenset[str] = frozenset()


async def test_a_slow_link_is_taken_only_for_its_workers_load(make: Make) -> None:
    def links(**gb_per_s: float) -> list[wpb.LinkLoad]:
        return [wpb.LinkLoad(worker_id=name, gb_per_s=speed) for name, speed in gb_per_s.items()]

    def used(*prefills: WorkerClient) -> set[str | None]:
        return {names(choose([*prefills, decode], need(str(i)), CONFIG, NOBODY))[0] for i in range(100)}

    decode = make("d0")
    here, there = make("p0", links=links(d0=300.0, d1=20.0)), make("p1", links=links(d0=20.0, d1=300.0))
    assert used(here, there) == {"p0"}
    assert used(here, make("p2", links=links(d0=100.0)), make("p3")) == {"p0", "p2", "p3"}  # alike, or not known yet
    here.queued_prompt_tokens = 2000
    assert used(here, there) == {"p1"}


async def test_a_key_keeps_its_workers_and_keys_spread(make: Make) -> None:
    workers = [make(name) for name in ("p0", "p1", "p2", "d0", "d1", "d2")]
    routes = {i: names(choose(workers, need(str(i)), CONFIG, NOBODY)) for i in range(300)}
    assert routes == {i: names(choose(list(reversed(workers)), need(str(i)), CONFIG, NOBODY)) for i in range(300)}
    assert all(70 < count < 130 for count in Counter(d for _, d in routes.values()).values())
    fewer = [w for w in workers if w.worker_id != "d2"]
    moved = [i for i in routes if names(choose(fewer, need(str(i)), CONFIG, NOBODY)) != routes[i]]
    assert set(moved) == {i for i, (_, d) in routes.items() if d == "d2"}


async def test_load_beats_affinity(make: Make) -> None:
    p0, p1, d0, d1 = (make(name) for name in ("p0", "p1", "d0", "d1"))
    workers = [p0, p1, d0, d1]
    d0.load.num_running, p1.queued_prompt_tokens = 3, 51
    assert {names(choose(workers, need(str(i)), CONFIG, NOBODY)) for i in range(50)} == {("p0", "d1")}
    p1.queued_prompt_tokens, d0.load.num_running = 50, 2
    assert len({names(choose(workers, need(str(i)), CONFIG, NOBODY)) for i in range(50)}) == 4
    d0.num_sequences = 9  # our own count is newer than the report
    assert names(choose(workers, need(), CONFIG, NOBODY))[1] == "d1"


async def test_only_workers_that_take_work(make: Make) -> None:
    p0, d0, d1 = make("p0"), make("d0"), make("d1")
    d0.load.state = wpb.WORKER_STATE_DRAINING
    assert {names(choose([p0, d0, d1], need(str(i)), CONFIG, NOBODY))[1] for i in range(20)} == {"d1"}
    d1.member.state = wpb.WORKER_STATE_DRAINING
    assert choose([p0, d0, d1], need(), CONFIG, NOBODY) is None
    d1.member.state = wpb.WORKER_STATE_READY
    d1.connection = Connection.LOST
    assert choose([p0, d0, d1], need(), CONFIG, NOBODY) is None


async def test_roles(make: Make) -> None:
    p0, d0, b0 = make("p0"), make("d0"), make("b0")
    assert names(choose([p0, d0, b0], need(), CONFIG, NOBODY)) == ("p0", "d0")
    assert names(choose([p0, b0], need(), CONFIG, NOBODY)) == (None, "b0")
    assert names(choose([p0, d0], need(first_token_only=True), CONFIG, NOBODY)) == ("p0", None)
    assert names(choose([p0], need(first_token_only=True), CONFIG, NOBODY)) == ("p0", None)
    assert names(choose([b0], need(first_token_only=True), CONFIG, NOBODY)) == (None, "b0")
    d0.load.num_running = 5
    assert names(choose([p0, d0, b0], need(), CONFIG, NOBODY)) == (None, "b0")
    assert choose([p0], need(), CONFIG, NOBODY) is None


async def test_workers_to_avoid_are_used_if_there_are_no_others(make: Make) -> None:
    p0, d0, d1 = make("p0"), make("d0"), make("d1")
    avoid = frozenset({"p0", "d1"})
    assert {names(choose([p0, d0, d1], need(str(i)), CONFIG, avoid)) for i in range(20)} == {("p0", "d0")}
    assert names(choose([p0, d1], need(), CONFIG, avoid)) == ("p0", "d1")


async def test_pools_too_small(make: Make) -> None:
    p0, small, large = make("p0"), make("d0", blocks=7), make("d1", blocks=12)
    workers = [p0, small, large]
    # 100 tokens and one to come fit 7 blocks; with 4 sequences 6 are shared and each has its own seventh.
    assert {names(choose(workers, need(str(i)), CONFIG, NOBODY))[1] for i in range(20)} == {"d0", "d1"}
    assert {names(choose(workers, need(str(i), n=4), CONFIG, NOBODY))[1] for i in range(20)} == {"d1"}
    with pytest.raises(RequestError, match="needs 14 KV blocks; worker 'd1' has 12") as caught:
        choose(workers, need(n=8), CONFIG, NOBODY)
    assert caught.value.reason == pb.ERROR_REASON_KV_CACHE_EXHAUSTED


async def test_the_longest_output_must_fit(make: Make) -> None:
    p0, small, large = make("p0", blocks=7), make("d0", blocks=8), make("d1", blocks=16)
    workers = [p0, small, large]
    # The last token is never written: 129 tokens end in 8 blocks.
    assert {names(choose(workers, need(str(i), total=129), CONFIG, NOBODY))[1] for i in range(20)} == {"d0", "d1"}
    assert {names(choose(workers, need(str(i), total=130), CONFIG, NOBODY))[1] for i in range(20)} == {"d1"}
    with pytest.raises(RequestError, match=r"of up to 258 tokens, prompt included, needs 17 .* 'd1' has 16") as caught:
        choose(workers, need(total=258), CONFIG, NOBODY)
    assert caught.value.reason == pb.ERROR_REASON_KV_CACHE_EXHAUSTED
    assert large.info is not None
    large.info.model.max_model_len = 200
    assert names(choose(workers, need(total=258), CONFIG, NOBODY)) == ("p0", "d1")
    assert names(choose(workers, need(total=258, first_token_only=True), CONFIG, NOBODY)) == ("p0", None)


async def test_free_pages_beat_load_and_affinity(make: Make) -> None:
    p0, d0, d1 = make("p0"), make("d0", free_blocks=7, num_running=4), make("d1", free_blocks=6)
    workers = [p0, d0, d1]

    def chosen(**more: Any) -> set[str | None]:
        return {names(choose(workers, need(str(i)), CONFIG, NOBODY, **more))[1] for i in range(20)}

    assert chosen() == {"d0"}  # 100 tokens and the next take 7
    d1.load.free_blocks = 7
    assert chosen() == {"d1"}
    d1.promised_blocks = 1  # on their way
    assert chosen() == {"d0"}
    d1.load.reserved_blocks = 1  # arrived: its own figures know
    assert chosen() == {"d1"}
    d1.load.num_waiting = 1
    assert chosen() == {"d0"}
    assert chosen(full=frozenset({"d0"})) == {"d1"}  # neither has room: the load decides
    d1.load.num_waiting, d0.load.num_running = 0, 0
    assert chosen() == {"d0", "d1"}
    assert chosen(full=frozenset({"d0"})) == {"d1"}


async def test_a_colocated_worker_with_room_is_better_than_a_full_pair(make: Make) -> None:
    workers = [make("p0"), make("d0", free_blocks=6), make("b0", free_blocks=7, num_running=2)]
    route = choose(workers, need(), CONFIG, NOBODY)
    assert names(route) == (None, "b0")
    workers[1].load.free_blocks = 7
    route = choose(workers, need(), CONFIG, NOBODY)
    assert names(route) == ("p0", "d0") and route is not None and route.has_other_decode


async def test_layouts_must_match(make: Make) -> None:
    old, new, d0 = make("p0", layout="old"), make("p1", layout="new"), make("d0", layout="new")
    assert {names(choose([old, new, d0], need(str(i)), CONFIG, NOBODY)) for i in range(20)} == {("p1", "d0")}
    with pytest.raises(RequestError, match="no prefill worker can hand its KV") as caught:
        choose([old, d0], need(), CONFIG, NOBODY)
    assert caught.value.reason == pb.ERROR_REASON_INCOMPATIBLE_WORKERS


def test_a_conversation_keeps_its_name_however_short_it_began() -> None:
    affinity = Affinity(8)
    first, answer = [1, 2, 3], [10, 11, 12, 13, 14, 15]
    name = affinity.key("", first)
    affinity.answered("", first, answer)
    second = [*first, *answer, 4]
    assert affinity.key("", second) == name == affinity.key("", [*second, 5, 6, 7])
    assert affinity.key("", [*first, 10, 11, 99, 13, 14]) != name  # another answer
    assert affinity.key("mine", second) == affinity_key("mine", (), 8)
    affinity.answered("", [1], [2])  # no name yet: prompts that begin so have nothing in common
    assert affinity.key("", [1, 2, 9, 9, 9, 9, 9, 9]) == affinity_key("", [1, 2, 9, 9, 9, 9, 9, 9], 8)
    affinity.answered("", list(range(20)), answer)
    assert affinity.key("", list(range(30))) == affinity_key("", list(range(8)), 8)


def test_few_conversations_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.affinity.MAX_REMEMBERED", 2)
    affinity = Affinity(4)
    for i in (1, 2):
        affinity.answered("", [i], [0, 0, 0])
    assert affinity.key("", [1, 0, 0, 0]) == affinity_key("", [1], 4)
    affinity.answered("", [3], [0, 0, 0])
    kept = [affinity.key("", [i, 0, 0, 0]) == affinity_key("", [i], 4) for i in (1, 2, 3)]
    assert kept == [True, False, True], "the least recently asked for goes"
