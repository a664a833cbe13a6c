"""Random walks of one-sided writers, their receiver and its quarantine: whatever is late, given up, asked or killed, no
page that has a new owner is ever written, and every page comes back."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv_transfer.base import ChunkHeader, ManifestBuilder, Placement, TransferError, TransferRefused
from kv_transfer.guards import Guards, open_guards
from kv_transfer.memory import Pages
from kv_transfer.open_transfers import OpenTransfers
from kv_transfer.receiver import Receiver
from tests.transfer import NUM_LAYERS, make_memory

LEASE_S = 10.0


class Writing:
    """A transfer at its writer: an Outgoing whose writes land when the walk says."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.in_flight: list[int] = []  # logical blocks
        self.landed: list[int] = []
        self.is_aborted = False
        self.closed = lambda _: None

    def abort(self, reason: str) -> None:
        self.is_aborted = True
        self.close_if_settled()

    def add_closed_callback(self, callback) -> None:
        self.closed = callback

    def close_if_settled(self) -> None:
        if self.is_aborted and not self.in_flight:
            callback, self.closed = self.closed, lambda _: None
            callback(self)


@dataclass
class Process:
    """A writer's process, by its incarnation."""

    source: tuple[str, str]
    on_host: bool  # of the receiver: sees the guards, and is seen to end
    transfers: OpenTransfers = field(default_factory=OpenTransfers)
    writing: dict[bytes, Writing] = field(default_factory=dict)


@dataclass
class Grant:
    blocks: list[int]
    process: Process
    headers: list[ChunkHeader] = field(default_factory=list)


recent = st.sampled_from((0, 0, 0, 1, 2))  # which of the last tickets


class Walk(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.guards = Guards()
        self.words = open_guards(self.guards.name)
        memory = make_memory(12)
        self.receiver = Receiver(memory, 1 << 20, lambda: self.now_s, progress_s=0.0, guards=self.guards)
        self.free = set(range(12))
        self.owned: dict[str, Grant] = {}  # by owner: pages that are not free
        self.tickets: dict[bytes, Grant] = {}  # all there ever were
        self.foreign: dict[int, int] = {}  # page -> byte that its new owner has put there
        self.num_processes = 0
        self.processes = [self.new_process(on_host) for on_host in (True, False)]

    def new_process(self, on_host: bool) -> Process:
        self.num_processes += 1
        return Process(("prefill-0", f"life {self.num_processes}"), on_host)

    @rule(count=st.integers(1, 3), which=st.integers(0, 1), is_heard=st.booleans())
    def grant(self, count: int, which: int, is_heard: bool) -> None:
        """`is_heard`: the answer arrives at the writer now; else it is late, or lost."""
        if len(self.free) < count:
            return
        blocks, process = [self.free.pop() for _ in range(count)], self.processes[which]
        for block in blocks:
            self.foreign.pop(block, None)
        owner = f"owner {len(self.tickets)}"
        transfer_id = self.receiver.grant(owner, process.source, blocks, 0, LEASE_S, process.source[1])
        self.tickets[transfer_id] = self.owned[owner] = Grant(blocks, process)
        self.receiver.begin(transfer_id, process.source)
        if is_heard:
            self.hear(transfer_id)

    @rule(back=recent)
    def hear_late(self, back: int) -> None:
        """The answer arrives, perhaps after the receiver gave the ticket up; the pages are ready."""
        transfer_id = self.recent(back)
        self.hear(transfer_id)
        self.write(back, 0)

    def hear(self, transfer_id: bytes) -> None:
        grant = self.tickets.get(transfer_id)
        if grant is None or grant.process not in self.processes or transfer_id in grant.process.writing:
            return
        placement = self.receiver.placement(transfer_id)
        assert placement is not None
        writing: Any = Writing(placement)
        try:
            grant.process.transfers.add(transfer_id, lambda: writing)
        except TransferRefused:
            return
        grant.process.writing[transfer_id] = writing

    @rule(back=recent, block=st.integers(0, 2))
    def write(self, back: int, block: int) -> None:
        """A write begins if its writer may: on the host it looks at the guard."""
        _, writing, grant = self.find(back)
        if writing is None or grant is None or block >= len(grant.blocks) or writing.is_aborted:
            return
        placement = writing.placement
        if grant.process.on_host and self.words[placement.guard] != placement.generation:
            return
        if block not in writing.in_flight + writing.landed:
            writing.in_flight.append(block)

    @rule(back=recent)
    def land(self, back: int) -> None:
        """What is in flight lies there, however late; then the writer says so."""
        transfer_id, writing, grant = self.find(back)
        if writing is None or grant is None or not writing.in_flight:
            return
        block = writing.in_flight.pop(0)
        page = writing.placement.page_ids[block]
        self.receiver.memory.slab[page] = 7 + block
        (digest,) = self.receiver.memory.digests([Pages([page], block, 0, NUM_LAYERS)])
        size = self.receiver.memory.width(0, NUM_LAYERS)
        header = ChunkHeader(len(grant.headers), 0, NUM_LAYERS, block, 1, size, digest)
        try:
            self.receiver.placed(transfer_id, [header])
        except TransferError:
            writing.is_aborted = True
        else:
            grant.headers.append(header)
            writing.landed.append(block)
        writing.close_if_settled()

    @rule(back=recent)
    def commit(self, back: int) -> None:
        """The writer commits what it has seen land, all of it."""
        transfer_id, writing, grant = self.find(back)
        if writing is None or grant is None or writing.is_aborted or writing.in_flight:
            return
        manifest = ManifestBuilder()
        for header in grant.headers:
            manifest.add(header)
        try:
            asyncio.run(self.receiver.commit(transfer_id, manifest.manifest()))
        except TransferError:
            writing.abort("refused")
        else:
            assert len(grant.headers) == len(grant.blocks) and transfer_id not in self.receiver.quarantine
            self.give_back(grant)
            writing.abort("over")

    @rule(back=recent, is_asked=st.booleans())
    def cancel(self, back: int, is_asked: bool) -> None:
        """By the receiver's side."""
        transfer_id = self.recent(back)
        if self.receiver.release(transfer_id) and transfer_id not in self.receiver.quarantine:
            raise AssertionError("a writer that may be writing was trusted")
        if is_asked:
            self.ask()

    @rule(back=recent)
    def give_up(self, back: int) -> None:
        """By the writer: it closes, and then says so."""
        transfer_id, writing, _ = self.find(back)
        if writing is not None:
            writing.abort("given up")
            if not writing.in_flight:
                self.receiver.release(transfer_id)
                self.fenced(self.receiver.quarantine.fence(transfer_id))

    @rule(seconds=st.sampled_from((1.0, 5.0, 12.0)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.receiver.expire()
        self.ask()

    def ask(self) -> None:
        """Of everybody in quarantine, who is a member."""
        for silent in self.receiver.quarantine.writers():
            assert 0 <= silent.age_s <= self.now_s - 1000
            for process in self.processes:
                if process.source == silent.source:
                    still_open = process.transfers.disown(silent.transfer_ids)
                    for transfer_id in set(silent.transfer_ids) - set(still_open):
                        self.fenced(self.receiver.quarantine.fence(transfer_id))

    @rule(which=st.sampled_from((0, 1, None, None, None)), is_seen=st.booleans())
    def kill(self, which: int | None, is_seen: bool) -> None:
        """Its writes end with it. On the host that is seen; elsewhere somebody may say so."""
        if which is None:
            return
        process, self.processes[which] = self.processes[which], self.new_process(bool(which == 0))
        process.writing.clear()
        if process.on_host or is_seen:
            for owner in self.receiver.quarantine.fence_gone(lambda source, name: name == process.source[1]):
                self.fenced(owner)

    @invariant()
    def holds(self) -> None:
        self.receiver.check()
        pages = self.receiver.memory.slab
        for block, value in self.foreign.items():
            assert (pages[block] == value).all(), "a page was written after it had a new owner"

    def recent(self, back: int) -> bytes:
        return ([b"no ticket at all"] * 3 + list(self.tickets))[-back - 1]

    def find(self, back: int) -> tuple[bytes, Writing | None, Grant | None]:
        transfer_id = self.recent(back)
        grant = self.tickets.get(transfer_id)
        return transfer_id, grant.process.writing.get(transfer_id) if grant is not None else None, grant

    def fenced(self, owner: str | None) -> None:
        if owner is not None:
            self.give_back(self.owned[owner])

    def give_back(self, grant: Grant) -> None:
        for block in grant.blocks:
            self.foreign[block] = block + 100
            self.receiver.memory.slab[block] = block + 100
            self.free.add(block)
        self.owned = {owner: one for owner, one in self.owned.items() if one is not grant}

    def teardown(self) -> None:
        """All writers die and are seen to: nothing is left."""
        for transfer_id in self.tickets:
            self.receiver.release(transfer_id)
        for owner in self.receiver.quarantine.fence_gone(lambda source, name: True):
            self.fenced(owner)
        assert not self.owned and len(self.free) == 12 and self.guards.num_taken == 0
        self.receiver.check()
        self.guards.close()


Walk.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestWalk = Walk.TestCase
