"""A prompt computed here goes on there: equal to one engine, nothing sent twice, nothing left behind."""

import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from engine.request import FirstToken
from tests.engines import KINDS, assert_idle, greedy, prompt, run, sampled
from tests.handoff import Handoff, Silent


def test_disaggregated_equals_colocated(llama: Path, pair) -> None:
    a, b, la, lb = pair
    requests = [
        sampled(kind, prompt(28 + 9 * i, i), seed=i, **params) for i, (kind, params) in enumerate(KINDS.items())
    ]
    requests += [sampled(f"n2-{n}", prompt(n, n), num_sequences=2) for n in (31, 32, 33)]
    requests += [greedy("long", prompt(150, 5), 25), greedy("one", prompt(9, 6), 1)]
    colocated = run(llama, requests)
    handoffs = [Handoff(a, b, la, request) for request in requests]
    for handoff in handoffs:
        handoff.start()
    first = {}
    for handoff in handoffs:
        first |= handoff.finish()
    going = {key for key in first if key not in la.finished}
    lb.until(lambda: going <= lb.finished)
    for key, tokens in first.items():
        assert tokens + lb.outputs.get(key, []) == colocated.outputs[key], key
    offsets = [t.offset for t in lb.tokens if t.request_id == "long"]
    assert offsets == list(range(1, 25))
    assert_idle(a)
    assert_idle(b)


def test_what_the_receiver_holds_is_not_sent_again(pair) -> None:
    a, b, la, lb = pair
    ids = prompt(70, 1033)
    sent = []
    for name in ("turn1", "turn2"):
        request = greedy(name, ids, 12)
        handoff = Handoff(a, b, la, request)
        handoff.start()
        handoff.finish()
        lb.wait(request)
        sent.append(handoff.num_bytes // a.layout.block_bytes)
        ids = [*ids, *la.outputs[name, 0], *lb.outputs[name, 0], *prompt(7, 34)]
    assert sent == [5, 1]  # 70 tokens; then 89, of which 81 are held: five whole blocks
    a.submit(greedy("kept", ids[:70], 1), Silent(a))
    la.until(lambda: ("kept", 0) in la.finished)
    assert la.started["kept"] == 64
    a.release("kept")
    assert_idle(a)
    assert_idle(b)


@pytest.mark.parametrize("where", ["wanted", "ready"])
def test_a_failing_sink_fails_its_request_alone(pair, where: str) -> None:
    a, _, la, _ = pair
    bad, good = greedy(f"bad-{where}", prompt(30, 1), 4), greedy(f"good-{where}", prompt(30, 2), 4)
    a.submit(bad, Silent(a, where))
    a.submit(good)
    la.wait(good)
    la.until(lambda: bad.id in la.failed)
    assert la.failed[bad.id].reason == "INTERNAL" and (bad.id, 0) not in la.outputs
    assert_idle(a)


def test_layers_are_reported_as_they_are_computed(llama: Path, pair, monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.runner

    a, b, la, lb = pair
    monkeypatch.setattr(engine.runner, "REPORT_BYTES", 1)
    handoff = Handoff(a, b, la, request := greedy("layers", prompt(75, 77), 3))
    handoff.start()
    handoff.finish()
    lb.wait(request)
    layers = a.layout.num_layers
    chunks = [(0, 2), (2, 3)]  # 40 tokens fill two blocks; the other 35 end the prompt in block 4
    assert handoff.calls == [(s, n, i, i + 1) for s, n in chunks for i in range(layers)]


def test_reservations_are_released_cancelled_and_gone(pair) -> None:
    _, b, _, _ = pair
    request = greedy("r", prompt(40), 4)
    reservation = b.reserve("x", request, 40).result(10)
    assert len(reservation.block_ids) == 3 and b.stats().reserved_blocks == 3
    b.release("x")
    b.release("x")
    with pytest.raises(KeyError):
        b.adopt("x", request, [FirstToken(1, False)]).result(10)
    assert_idle(b)
    assert len(b.reserve("hog", greedy("hog", prompt(5), 4), 500).result(10).block_ids) == 32
    hogs = [b.reserve(f"hog{i}", greedy(f"hog{i}", prompt(5), 4), 500) for i in range(5)]
    assert all(future.result(10) for future in hogs[:3])  # the pool holds four
    b.release("hog4")
    with pytest.raises(CancelledError):
        hogs[4].result(10)
    assert hogs[3].cancel()  # whoever asked has gone away
    for owner in ("hog", "hog0", "hog1", "hog2"):
        b.release(owner)
    deadline = time.monotonic() + 10
    while b.stats().num_requests and time.monotonic() < deadline:
        b.check().result(10)
    assert_idle(b)
    with pytest.raises(ValueError, match="num_tokens"):
        b.reserve("y", request, 4000)
