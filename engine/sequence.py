"""What the scheduler moves around: sequences, queued reservations, and the plan of one step. Plain Python."""

from dataclasses import dataclass, field
from enum import Enum

from engine.request import Event, Request, Reservation, TokenLogprob


class Status(Enum):
    WAITING = "waiting"  # in the queue, holds no blocks
    RUNNING = "running"  # holds blocks, computes
    ENDED = "ended"


class Gate(Enum):
    """A prompt whose KV leaves this engine holds nothing here until the receiver has pages for it."""

    CLOSED = "closed"
    ASKED = "asked"
    OPEN = "open"


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation of a request.

    token_ids   [0 ........ num_computed ........ len)
                 KV is in the blocks | to compute; the last token's logits give the next token
    """

    request: Request
    index: int
    token_ids: list[int]
    arrival: int
    forks: int = 1  # how many sequences its next sampled row starts: n until the prompt is done, then 1
    receiver: str | None = None  # who takes the prompt's KV; None: nobody, the sequence goes on here
    gate: Gate = Gate.OPEN
    status: Status = Status.WAITING
    was_preempted: bool = False
    was_started: bool = False
    block_ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as needed yet
    num_computed: int = 0
    num_launched: int = 0  # tokens of rows in flight: launched, their results not taken in yet
    num_unknown: int = 0  # rows in flight that sample: tokens that only the device knows yet
    num_committed: int = 0  # leading blocks already offered to the prefix cache
    num_reported: int = 0  # leading blocks that the sink's receiver holds or was told of

    @property
    def is_sink(self) -> bool:
        return self.receiver is not None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that no row has been made for, those included that only the device knows."""
        return len(self.token_ids) + self.num_unknown - self.num_computed - self.num_launched

    @property
    def order(self) -> tuple[bool, int, int, int]:
        """Preempted ones first, then by priority, then first come, first served."""
        return (not self.was_preempted, self.request.priority, self.arrival, self.index)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Order in the running batch; the highest is preempted first."""
        return (self.request.priority, self.arrival, self.index)


@dataclass(slots=True, eq=False)
class QueuedReservation:
    owner: str
    request: Request
    num_tokens: int
    arrival: int
    align: int  # blocks: prefix hits are a multiple of it

    @property
    def order(self) -> tuple[bool, int, int, int]:
        return (True, self.request.priority, self.arrival, 0)


@dataclass(slots=True)
class HeldReservation:
    """Blocks on loan until adopt or release. `growth` is for the first generated token and each fork's own tail."""

    request: Request
    block_ids: list[int]
    num_cached: int  # leading blocks that came from the prefix cache
    growth: list[int]
    hashes: list[bytes]


@dataclass(slots=True)
class Run:
    """A request inside the engine: its live sequences, or the pinned blocks of a finished sink prompt."""

    request: Request
    live: list[Sequence]
    pinned: list[int] | None = None


@dataclass(slots=True)
class Row:
    """`num_tokens` of one sequence from `start` on, computed in this step.

    `samples`: its last token is the sequence's last, so its logits give the next token.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    report: tuple[int, int] | None = None  # logical blocks that become final in this step, for the sink
    samples: bool = field(init=False)

    def __post_init__(self) -> None:
        self.samples = self.stop == len(self.sequence.token_ids) + self.sequence.num_unknown

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


@dataclass(slots=True, eq=False)
class Plan:
    """One step. Everything but `rows` is news that holds whether or not there is anything to compute."""

    rows: list[Row] = field(default_factory=list)
    must_settle: bool = False  # what is in flight must be taken in before the next plan: blocks or tokens are needed
    events: list[Event] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)  # sink prompts that would be computed next
    granted: list[Reservation] = field(default_factory=list)
    cached: list[tuple[str, int, list[int]]] = field(default_factory=list)  # sink prompt, first block, block ids: hits


@dataclass(slots=True)
class RowResult:
    """What a row's logits gave: a token for each fork (none when the row does not sample), or why not."""

    tokens: list[tuple[int, TokenLogprob | None]] = field(default_factory=list)
    error: tuple[str, str] | None = None  # reason, message: the request fails


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters are cumulative since the engine was built."""

    num_requests: int = 0  # requests and reservations, whatever their phase
    num_reservations: int = 0  # held and queued
    num_running: int = 0  # sequences in the running batch
    num_waiting: int = 0  # sequences and reservations queued
    num_waiting_tokens: int = 0
    total_blocks: int = 0
    free_blocks: int = 0  # unused or evictable
    reserved_blocks: int = 0
    pinned_blocks: int = 0
    quarantined_blocks: int = 0  # of reservations given up while someone may still write to them
    steps: int = 0
    prompt_tokens_computed: int = 0  # recomputation after a preemption included
    prompt_tokens_cached: int = 0
    prompt_tokens_returned: int = 0  # of those cached: KV that a decode worker made and returned
    tokens_generated: int = 0
    preemptions: int = 0
