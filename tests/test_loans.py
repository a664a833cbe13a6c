"""Loans of cache blocks to transfers: what a request finds afterwards, and that none ever waits for one."""

import pytest

from engine.invariants import check
from engine.prefix import block_hashes
from tests.scheduling import Simulator, make_request


def give(sim: Simulator, owner: str, token_ids, namespace: bytes = b"") -> bool:
    """What a return does at the receiving side: reserve, fill, insert."""
    sim.apply()
    reservation = sim.scheduler.loans.reserve(owner, block_hashes(token_ids, sim.block_size, namespace))
    if reservation is None:
        return False
    check(sim.scheduler)
    sim.verify(reservation.block_ids, token_ids[: reservation.num_cached_tokens], owner)
    sim.fill(reservation.block_ids, token_ids, reservation.num_cached_tokens)
    sim.scheduler.loans.insert(owner)
    check(sim.scheduler)
    return True


def stats(sim: Simulator):
    return sim.scheduler.stats()


def test_an_inserted_answer_is_a_hit_for_the_next_turn() -> None:
    sim = Simulator()
    prompt = list(range(40))
    sim.scheduler.add(make_request("1", prompt, max_tokens=1))
    sim.run()
    chat = [*prompt, *range(100, 130)]
    assert give(sim, "loan", chat[:64])
    assert stats(sim).free_blocks == 16 and not stats(sim).reserved_blocks and not stats(sim).pinned_blocks
    before = stats(sim).prompt_tokens_computed
    sim.scheduler.add(make_request("2", [*chat, 7, 8, 9]))
    sim.run()
    assert sim.started["2"] == 64 and stats(sim).prompt_tokens_computed - before == len(chat) + 3 - 64
    assert sim.returned["2"] == 32 == stats(sim).prompt_tokens_returned  # the prompt's two blocks were computed here
    sim.scheduler.add(make_request("other", [*chat, 7, 8, 9], namespace=b"other tenant"))
    sim.run()
    assert sim.started["other"] == 0


def test_first_n_minus_one_holds_for_returned_blocks() -> None:
    sim = Simulator()
    assert give(sim, "loan", list(range(32)))
    sim.scheduler.add(make_request("same", range(32)))
    sim.run()
    assert sim.started["same"] == 16


def test_retained_blocks_outlive_pressure_and_are_read_unchanged() -> None:
    sim = Simulator(num_blocks=8)
    chat = list(range(50))
    sim.scheduler.add(make_request("1", chat, max_tokens=1))
    sim.run()
    pinned = sim.scheduler.loans.retain("loan", block_hashes(chat, 16))
    assert len(pinned) == 3 == stats(sim).pinned_blocks and stats(sim).free_blocks == 5
    for i in range(4):
        sim.scheduler.add(make_request(f"other{i}", range(1000 * i, 1000 * i + 60), max_tokens=4))
    sim.run()
    sim.verify(pinned, chat[:48], "a pinned block")
    sim.scheduler.release("loan")
    sim.scheduler.release("loan")
    assert stats(sim).free_blocks == 8


def test_only_what_is_cached_is_retained() -> None:
    sim = Simulator()
    chat = list(range(50))
    sim.scheduler.add(make_request("1", chat[:20], max_tokens=1))
    sim.run()
    assert len(sim.scheduler.loans.retain("a", block_hashes(chat, 16))) == 1
    assert sim.scheduler.loans.retain("b", block_hashes(chat, 16, b"another")) == ()
    with pytest.raises(ValueError, match="'a' has a loan"):
        sim.scheduler.loans.retain("a", block_hashes(chat, 16))
    sim.scheduler.release("a")
    check(sim.scheduler)


def test_a_loan_leaves_room_or_is_refused() -> None:
    sim = Simulator(num_blocks=16)
    hashes = block_hashes(range(16 * 13), 16)
    assert sim.scheduler.loans.reserve("a", hashes) is None  # of 16 blocks a quarter stays free
    assert sim.scheduler.loans.reserve("a", hashes[:12]) is not None and stats(sim).reserved_blocks == 12
    assert sim.scheduler.loans.reserve("b", block_hashes(range(900, 916), 16)) is None
    sim.scheduler.release("a")
    sim.scheduler.add(make_request("hog", range(5000, 5000 + 180), max_tokens=8))
    sim.step()
    assert sim.scheduler.loans.reserve("b", block_hashes(range(900, 916), 16)) is None  # a decode may grow
    sim.run()
    assert stats(sim).free_blocks == 16 and sim.scheduler.loans.retain("c", block_hashes(range(5000, 5170), 16))
    sim.scheduler.release("c")


def test_nothing_is_lent_while_a_prompt_waits() -> None:
    sim = Simulator(num_blocks=16, max_num_seqs=1)
    sim.scheduler.add(make_request("runs", range(20), max_tokens=30))
    sim.scheduler.add(make_request("waits", range(50, 60)))
    sim.step()
    assert sim.scheduler.loans.reserve("a", block_hashes(range(900, 916), 16)) is None
    sim.run()
    assert sim.scheduler.loans.reserve("a", block_hashes(range(900, 916), 16)) is not None
    # What is here already needs no blocks, however short they are.
    sim.scheduler.release("a")
    sim.scheduler.add(make_request("again", range(20), max_tokens=30))
    sim.scheduler.add(make_request("waits again", range(50, 60)))
    sim.step()
    held = sim.scheduler.loans.reserve("b", block_hashes(range(16), 16))
    assert held is not None and held.num_cached_tokens == 16 and stats(sim).reserved_blocks == 0
    sim.scheduler.release("b")
    sim.run()
    assert stats(sim).free_blocks == 16


def test_blocks_given_up_half_filled_are_wiped_and_never_hits() -> None:
    sim = Simulator(num_blocks=8)
    chat = list(range(48))
    reservation = sim.scheduler.loans.reserve("a", block_hashes(chat, 16))
    assert reservation is not None
    sim.fill(reservation.block_ids, chat[:20])
    sim.scheduler.release("a")
    sim.apply()
    assert all(slot is None for block_id in reservation.block_ids for slot in sim.slots[block_id])
    sim.scheduler.add(make_request("1", chat))
    sim.run()
    assert sim.started["1"] == 0
    with pytest.raises(KeyError):
        sim.scheduler.loans.insert("a")


def test_blocks_computed_here_meanwhile_stay_the_cached_ones() -> None:
    sim = Simulator()
    chat = list(range(48))
    reservation = sim.scheduler.loans.reserve("a", block_hashes(chat, 16))
    assert reservation is not None
    sim.scheduler.add(make_request("1", chat, max_tokens=1))
    sim.run()
    sim.fill(reservation.block_ids, chat)
    sim.scheduler.loans.insert("a")
    check(sim.scheduler)
    sim.scheduler.add(make_request("2", [*chat, 5], max_tokens=1))
    sim.run()
    assert sim.started["2"] == 48 and sim.returned["2"] == 0 and stats(sim).free_blocks == 16


def test_no_loan_without_a_prefix_cache() -> None:
    sim = Simulator(caching=False)
    assert sim.scheduler.loans.reserve("a", block_hashes(range(16), 16)) is None
