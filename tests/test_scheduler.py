"""The scheduler on a pretend device: exact plans where they matter. Random histories are in test_scheduler_lives.py."""

import pytest

from engine.limits import Limits
from engine.prefix import block_hashes
from engine.request import FirstToken, Request, SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import RowResult
from tests.scheduling import Simulator, expected, idle, make_request, next_token


def done(sim: Simulator, request: Request, n: int = 1) -> None:
    for index in range(n):
        assert sim.outputs[request.id, index] == expected(request, index, sim.max_model_len), request.id


def test_decodes_go_first_and_prompts_fill_the_budget_in_chunks() -> None:
    sim = Simulator(max_num_batched_tokens=20)
    a, b = make_request("a", range(5)), make_request("b", range(10, 50))
    sim.scheduler.add(a)
    sim.scheduler.add(b)
    shapes = [[(r.sequence.request.id, r.start, r.num_tokens) for r in sim.step().rows] for _ in range(4)]
    assert shapes == [
        [("a", 0, 5), ("b", 0, 15)],
        [("a", 5, 1), ("b", 15, 19)],
        [("a", 6, 1), ("b", 34, 6)],
        [("a", 7, 1), ("b", 40, 1)],
    ]
    sim.run()
    done(sim, a)
    done(sim, b)
    idle(sim)


def test_a_prompt_is_hashed_as_far_as_it_is_found() -> None:
    sim = Simulator()
    sim.scheduler.add(make_request("1", range(60), max_tokens=1))
    sim.run()
    sim.scheduler.add(make_request("2", [*range(48), *range(100, 150)], max_tokens=1))
    (row,) = sim.scheduler.schedule().rows
    assert row.start == 48 and row.sequence.hashes == block_hashes(row.sequence.token_ids, 16)[:4]
    sim.scheduler.reserve("owner", make_request("3", range(300, 350)), 50)
    assert sim.scheduler.schedule().granted
    assert len(sim.scheduler.admission.held["owner"].hashes) == 3, "not when it is adopted"


def test_second_turn_computes_only_new_blocks() -> None:
    sim = Simulator()
    first = make_request("1", range(40), max_tokens=10)
    sim.scheduler.add(first)
    sim.run()
    before = sim.scheduler.stats().prompt_tokens_computed
    history = [*range(40), *sim.outputs["1", 0], *range(7)]
    sim.scheduler.add(make_request("2", history))
    sim.run()
    assert sim.started["2"] == 48  # 49 tokens of KV were written: three whole blocks
    assert sim.scheduler.stats().prompt_tokens_computed - before == len(history) - 48
    sim.scheduler.add(make_request("other", history, namespace=b"other tenant"))
    sim.scheduler.add(make_request("bypass", history, use_prefix_cache=False))
    sim.run()
    assert sim.started["other"] == sim.started["bypass"] == 0


def test_the_last_token_is_always_computed() -> None:
    sim = Simulator()
    for name in ("1", "2"):
        sim.scheduler.add(make_request(name, range(32)))
        sim.run()
    assert sim.started == {"1": 0, "2": 16}


def test_tiny_pool_preempts_and_finishes() -> None:
    sim = Simulator(num_blocks=7, max_model_len=112)
    requests = [make_request(str(i), range(i, i + 20), max_tokens=50) for i in range(8)]
    for request in requests:
        sim.scheduler.add(request)
    sim.run()
    for request in requests:
        done(sim, request)
    assert sim.preemptions == sim.scheduler.stats().preemptions > 0
    idle(sim)


def test_lowest_priority_youngest_is_preempted_and_comes_back_first() -> None:
    sim = Simulator(num_blocks=4, max_model_len=64)
    sim.scheduler.add(make_request("old", range(30), max_tokens=30))
    sim.scheduler.add(make_request("low", range(1, 16), max_tokens=30, priority=5))
    sim.step()
    sim.step()
    sim.scheduler.add(make_request("new", range(9), max_tokens=3))
    while not sim.preemptions:
        plan = sim.step()
    assert [e.request_id for e in plan.events] == ["low"]
    order = []
    while plan.rows:
        plan = sim.step()
        order += [r.sequence.request.id for r in plan.rows if r.sequence.request.id != "old"]
    assert order[0] == "low" and order.index("new") > order.index("low")
    done(sim, make_request("low", range(1, 16), max_tokens=30))


def test_forks_share_the_prompt() -> None:
    sim = Simulator()
    request = make_request("n", range(37), max_tokens=12, n=3)
    sim.scheduler.add(request)
    sim.step()
    sim.step()
    used = sim.num_blocks - sim.scheduler.pool.num_free
    assert used == 2 + 3  # two full blocks once, a tail for each
    sim.run()
    done(sim, request, 3)
    idle(sim)


def test_sink_prompts_ask_one_step_ahead_and_stand_aside() -> None:
    sim = Simulator(max_num_batched_tokens=48)
    for name in "abcd":
        sim.scheduler.add(make_request(name, range(30)), receiver="b")
    local = make_request("local", range(5))
    sim.scheduler.add(local)
    assert [r.sequence.request.id for r in sim.step().rows] == ["local"]
    assert sim.wanted == ["a"]  # b would make it more than one step's worth
    sim.scheduler.grant("a", 0)
    sim.step()
    sim.step()
    assert sim.wanted == ["a", "b"] and sim.reported["a"] == [0, 1]
    sim.scheduler.release("a")
    for name in "bcd":
        sim.scheduler.grant(name, 1)
        sim.run()
        assert sim.reported[name] == [1]
        assert sim.outputs[name, 0] == expected(make_request(name, range(30), max_tokens=1), 0)
    assert sim.scheduler.stats().pinned_blocks == 4 + 2  # the shared first block is pinned three times
    for name in "bcd":
        sim.scheduler.release(name)
    idle(sim)


def test_a_receiver_without_pages_holds_up_only_its_own_prompts() -> None:
    sim = Simulator(max_num_batched_tokens=48)
    for name in ("full 1", "full 2", "idle 1", "full 3", "idle 2"):
        sim.scheduler.add(make_request(name, range(30)), receiver=name[:4])
    sim.step()
    assert sim.wanted == ["full 1", "idle 1"]
    sim.scheduler.grant("idle 1", 0)
    sim.step()
    sim.step()
    assert sim.wanted == ["full 1", "idle 1", "idle 2"]
    assert sim.outputs["idle 1", 0]
    for name in ("full 1", "full 2", "full 3", "idle 1", "idle 2"):
        sim.scheduler.abort(name)
    idle(sim)


def test_an_asked_prompt_longer_than_a_step_still_asks_alone() -> None:
    sim = Simulator(max_num_batched_tokens=16)
    for name in "ab":
        sim.scheduler.add(make_request(name, range(60)), receiver="b")
    sim.step()
    assert sim.wanted == ["a"]
    sim.scheduler.abort("a")
    sim.step()
    assert sim.wanted == ["a", "b"]


@pytest.mark.parametrize("length", [31, 32, 33])
@pytest.mark.parametrize("n", [1, 3])
def test_adopted_equals_colocated(length: int, n: int) -> None:
    sim = Simulator()
    request = make_request("r", range(length), max_tokens=9, n=n)
    sim.scheduler.reserve("peer", request, length)
    sim.step()
    reservation = sim.granted["peer"]
    assert len(reservation.block_ids) == -(-length // 16) and reservation.num_cached_tokens == 0
    sim.fill(reservation.block_ids, request.token_ids)
    first = [next_token(request.token_ids, i) for i in range(n)]
    with pytest.raises(KeyError):
        sim.scheduler.adopt("nobody", request, [])
    with pytest.raises(ValueError):
        sim.scheduler.adopt("peer", request, [])
    sim.scheduler.adopt("peer", request, [FirstToken(t, finished=False) for t in first])
    sim.outputs = {("r", i): [t] for i, t in enumerate(first)}
    sim.run()
    done(sim, request, n)
    idle(sim)
    sim.scheduler.reserve("again", make_request("again", range(length)), length)
    sim.step()
    assert sim.granted["again"].num_cached_tokens == (length - 1) // 16 * 16
    sim.scheduler.release("again")
    idle(sim)


@pytest.mark.parametrize(("multiple", "num_cached"), [(1, 80), (16, 80), (32, 64), (64, 64), (48, 48), (128, 0)])
def test_cached_tokens_of_a_reservation_are_whole_blocks_of_its_peer(multiple: int, num_cached: int) -> None:
    """What is cut off are fresh pages: the peer will write there, and a cached page is never written."""
    sim = Simulator()
    first = make_request("first", range(90), max_tokens=1)
    sim.scheduler.add(first)
    sim.run()
    cached = set(sim.scheduler.pool.match(block_hashes(range(90), 16)))
    sim.scheduler.pool.release(list(cached))
    sim.scheduler.reserve("peer", make_request("again", range(90)), 90, multiple)
    sim.step()
    reservation = sim.granted["peer"]
    assert reservation.num_cached_tokens == num_cached and len(cached) == 5
    assert not cached & set(reservation.block_ids[num_cached // 16 :])
    sim.scheduler.release("peer")
    idle(sim)
    loan = sim.scheduler.loans.reserve("offer", block_hashes(range(90), 16), sim.scheduler.blocks.align(multiple))
    assert loan is not None and loan.num_cached_tokens == num_cached
    sim.scheduler.release("offer")
    idle(sim)


def test_reservations_wait_in_order_and_never_preempt() -> None:
    sim = Simulator(num_blocks=6, max_model_len=96)
    runner = make_request("runner", range(30), max_tokens=40)
    sim.scheduler.add(runner)
    sim.step()
    sim.step()
    for owner, tokens, priority in (("big", 60, 0), ("small", 10, 0), ("urgent", 10, -1)):
        sim.scheduler.reserve(owner, make_request(owner, range(100, 100 + tokens), priority=priority), tokens)
    sim.step()
    assert list(sim.granted) == ["urgent"]  # small fits, too, but must not overtake big
    assert sim.preemptions == 0
    sim.scheduler.release("urgent")
    sim.run()
    done(sim, runner)
    sim.step()
    assert list(sim.granted) == ["urgent", "big", "small"]
    for owner in sim.granted:
        sim.scheduler.release(owner)
    idle(sim)


def test_a_failed_row_fails_its_request_alone_and_leaves_no_cache() -> None:
    sim = Simulator()
    good, bad = make_request("good", range(20)), make_request("bad", range(30, 62))
    sim.scheduler.add(good)
    sim.scheduler.add(bad)
    error = RowResult(error=("NON_FINITE_LOGITS", "nan"))
    while "bad" not in sim.failed:
        sim.step(lambda row: error if row.sequence.request.id == "bad" else None)
    sim.run()
    assert sim.failed == {"bad": "NON_FINITE_LOGITS"}
    done(sim, good)
    sim.scheduler.add(make_request("bad again", range(30, 62)))
    sim.run()
    assert sim.started["bad again"] == 0
    idle(sim)


def test_what_can_never_fit_is_refused() -> None:
    limits = Limits(vocab_size=50, max_model_len=64, max_num_seqs=2, num_blocks=3, block_size=16)

    def request(tokens=(1,) * 20, prompt=None, **sampling) -> Request:
        return Request("r", tuple(tokens), len(tokens) if prompt is None else prompt, SamplingParams(**sampling))

    limits.check_submit(request())
    limits.check_reserve(request(num_sequences=2), 20)
    cases = [
        (request(()), "token_ids: 0 tokens"),
        (request((1,) * 64), "token_ids: 64 tokens is not in"),
        (request((1, 50)), "token id 50 is not in"),
        (request((1, -1)), "token id -1 is not in"),
        (request(prompt=0), "num_prompt_tokens: 0"),
        (request(prompt=21), "num_prompt_tokens: 21"),
        (request(prompt=4, max_tokens=16), "max_tokens: 16 is not above"),
        (request(prompt=19, num_sequences=2), "already hold output"),
        (request(num_sequences=3), "num_sequences: 3"),
        (request(max_tokens=40), "need 4 KV blocks"),
        (request(stop_token_ids=frozenset([99])), "stop_token_ids"),
        (request(logit_bias={99: 1.0}), "logit_bias"),
    ]
    for bad, words in cases:
        with pytest.raises(ValueError, match=words):
            limits.check_submit(bad)
    with pytest.raises(ValueError, match="num_tokens: 10"):
        limits.check_reserve(request(), 10)
    with pytest.raises(ValueError, match="need 4 KV blocks"):
        limits.check_reserve(request((1,) * 40, num_sequences=2), 40)


def test_launched_ahead_gives_the_same_and_drops_what_lies_beyond_eos() -> None:
    requests = [make_request(str(i), range(100 * i, 100 * i + 20 + i), 30) for i in range(6)]
    outputs = []
    for ahead in (False, True):
        sim = Simulator(ahead=ahead, eos=frozenset({5, 9, 17, 23}), num_blocks=12)
        for request in requests:
            sim.scheduler.add(request)
        sim.run()
        idle(sim)
        outputs.append(sim.outputs)
    assert outputs[0] == outputs[1] and min(map(len, outputs[0].values())) < 30


def test_scheduler_and_pool_import_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, engine.scheduler, engine.block_pool, engine.request, engine.prefix, engine.limits, engine.config\n"
        "assert not {'torch', 'transformers', 'grpc', 'ray'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_many_queued_prompts_cost_little() -> None:
    scheduler = Scheduler(64, 16, 8, 64, 512)
    for i in range(2000):
        scheduler.add(make_request(str(i), range(30)), receiver="b" if i % 2 == 0 else None)
    assert len(scheduler.schedule().rows) >= 1
