"""From the engine's thread to the event loop: one hop per engine step."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from engine.request import Event

Handler = Callable[[Event], None]
_log = logging.getLogger(__name__)


class Dispatcher:
    """Hands each event of a step to its request's handler, on the loop, then tells the listeners the step is over.

    The engine thread pays one `call_soon_threadsafe` a step however many requests it carries. Events of requests
    without a handler (aborted a moment ago) are dropped.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._handlers: dict[str, Handler] = {}
        self._early: dict[str, Handler] = {}
        self._after_step: list[Callable[[], None]] = []

    def on_events(self, events: Sequence[Event]) -> None:
        """The engine's callback, on its thread. A loop that has closed has nobody left to tell."""
        if self._early:
            for event in events:
                self._hear_early(event)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def add(self, request_id: str, handler: Handler, early: Handler | None = None) -> None:
        """`early` hears the same on the engine's thread, before the loop does, for what must not wait for it."""
        if early is not None:
            self._early[request_id] = early
        self._handlers[request_id] = handler

    def remove(self, request_id: str) -> None:
        self._handlers.pop(request_id, None)
        self._early.pop(request_id, None)

    def after_step(self, listener: Callable[[], None]) -> None:
        """`listener` runs after every step's events: what gathers per-step messages flushes there."""
        self._after_step.append(listener)

    def _hear_early(self, event: Event) -> None:
        handler = self._early.get(event.request_id)
        if handler is not None:
            try:
                handler(event)
            except Exception:  # the loop must hear of the step all the same
                _log.exception("a listener on the engine's thread failed on an event of %s", event.request_id)

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            handler = self._handlers.get(event.request_id)
            if handler is not None:
                handler(event)
        for listener in self._after_step:
            listener()
