"""From the engine's thread to the event loop: one hop per engine step."""

import asyncio
from collections.abc import Callable, Sequence

from engine.request import Event

Handler = Callable[[Event], None]


class Dispatcher:
    """Hands each event of a step to its request's handler, on the loop, then tells the listeners the step is over.

    The engine thread pays one `call_soon_threadsafe` a step however many requests it carries. Events of requests
    without a handler (aborted a moment ago) are dropped.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._handlers: dict[str, Handler] = {}
        self._after_step: list[Callable[[], None]] = []

    def on_events(self, events: Sequence[Event]) -> None:
        """The engine's callback; any thread. A loop that has closed has nobody left to tell."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def add(self, request_id: str, handler: Handler) -> None:
        self._handlers[request_id] = handler

    def remove(self, request_id: str) -> None:
        self._handlers.pop(request_id, None)

    def after_step(self, listener: Callable[[], None]) -> None:
        """`listener` runs after every step's events: what gathers per-step messages flushes there."""
        self._after_step.append(listener)

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            handler = self._handlers.get(event.request_id)
            if handler is not None:
                handler(event)
        for listener in self._after_step:
            listener()
