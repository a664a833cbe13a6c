"""When what happened in a hand-off, seen from inside the two workers: for benchmarks/handoff_cuda.py.

A worker's process wraps the methods named below, so that each call leaves a time of CLOCK_MONOTONIC, which all
processes of a host share; the product has no hooks for it. Marks tell of one hand-off at a time. On a GPU the moments
at which the model's kernels ended come from events, compared afterwards with an event recorded then: right to 0.02 ms.
"""

import inspect
import time
from typing import Any

import torch

from decode_worker.decoder import Decoder
from decode_worker.kv_service import KvTransferServicer
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.steps import Flight
from kv_transfer.outgoing import ChunkedOutgoing
from kv_transfer.peers import Peer
from kv_transfer.placed import PlacedOutgoing
from kv_transfer.receiver import Receiver
from prefill_worker.handoff import Handoff

# mark, where (P prefill, D decode), what it tells. In order, as far as each waits for the one before.
MARKS = (
    ("computed", "P", "GPU: keys and values of the last layer are there"),
    ("step_ended", "P", "GPU: attention, MLP, head and sampling of the last token are done"),
    ("token_here", "P", "the engine's thread has the first token"),
    ("landed", "P", "the last pages are written, and announced"),
    ("posted", "P", "the engine's thread has sent the commit, if the link can do so"),
    ("committing", "P", "the event loop has the first token"),
    ("checking", "D", "the last check of pages begins"),
    ("checked", "D", "the last check ends"),
    ("commit_here", "D", "the commit is there: on the control server's thread, or as a call"),
    ("commit_seen", "D", "the event loop asks whether its manifest is verified"),
    ("verified", "D", "it is"),
    ("adopting", "D", "the engine's thread adopts"),
    ("launching", "D", "the first step is being launched"),
    ("launched", "D", "the first step with the KV is launched: the target's moment"),
)
START, STOP = "computed", "launched"

# what is wrapped: class, method, mark at its start, mark at its end
_CALLS: tuple[tuple[type, str, str | None, str | None], ...] = (
    (Flight, "wait", None, "token_here"),
    (Handoff, "commit", "committing", None),
    (PlacedOutgoing, "_wait", None, "landed"),
    (ChunkedOutgoing, "_step", None, "landed"),
    (Peer, "post_commit", None, "posted"),
    (Receiver, "placed", "checking", "checked"),
    (Receiver, "chunk", "checking", "checked"),
    (KvTransferServicer, "Commit", "commit_here", None),
    (KvTransferServicer, "commit_from_socket", "commit_here", None),
    (Receiver, "commit", "commit_seen", None),
    (Decoder, "adopt", "verified", None),
    (Scheduler, "adopt", "adopting", None),
    (Runner, "launch", "launching", "launched"),
)
_FIRST = ("posted", "launching", "launched")  # the first one counts, of the others the last


class Marks:
    """Of this process, from now on. `place`: P or D."""

    def __init__(self, place: str, device: str) -> None:
        self._device = device
        self._mine = {mark for mark, where, _ in MARKS if where == place}
        self._times: dict[str, float] = {}
        self._events: dict[str, torch.cuda.Event] = {}
        for kind, name, before, after in _CALLS:
            if {before, after} & self._mine:
                self._wrap(kind, name, before, after)
        if place == "P":
            self._watch_device()

    def clear(self) -> None:
        self._times, self._events = {}, {}

    def take(self) -> dict[str, float]:
        """Seconds of CLOCK_MONOTONIC, of the hand-off since `clear`."""
        found = dict(self._times)
        if self._events:
            with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
                now = _record()
                now.synchronize()
            now_s = time.monotonic()
            for mark, event in self._events.items():
                event.synchronize()
                found[mark] = now_s - event.elapsed_time(now) / 1e3
        return found

    def _note(self, mark: str | None) -> None:
        if mark in _FIRST:
            self._times.setdefault(mark, time.monotonic())
        elif mark is not None:
            self._times[mark] = time.monotonic()

    def _wrap(self, kind: type, name: str, before: str | None, after: str | None) -> None:
        own = getattr(kind, name)

        async def awaited(*args: Any, **kwargs: Any) -> Any:
            self._note(before)
            try:
                return await own(*args, **kwargs)
            finally:
                self._note(after)

        def called(*args: Any, **kwargs: Any) -> Any:
            self._note(before)
            try:
                return own(*args, **kwargs)
            finally:
                self._note(after)

        setattr(kind, name, awaited if inspect.iscoroutinefunction(own) else called)

    def _watch_device(self) -> None:
        """Of the last layer that is reported, and of the last step launched."""
        is_cuda = self._device != "cpu"
        ready, begin = Handoff.ready, Flight.__init__

        def reported(*args: Any) -> None:
            if is_cuda:
                self._events["computed"] = args[-1]
            else:
                self._note("computed")
            ready(*args)

        def launched(*args: Any) -> None:
            begin(*args)
            self._events["step_ended"] = _record()

        Handoff.ready = reported  # type: ignore[method-assign]
        if is_cuda:
            Runner.event = lambda runner: _record(blocking=True)  # type: ignore[method-assign]
            Flight.__init__ = launched  # type: ignore[method-assign]


def _record(blocking: bool = False) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True, blocking=blocking)
    event.record()
    return event
