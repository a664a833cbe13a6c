"""Steps that were launched and whose results are not known yet, oldest first: from the runner to the scheduler."""

import logging
from collections import deque
from collections.abc import Mapping

from engine.request import Event
from engine.runner import Handle, KVSink, Runner
from engine.scheduler import Scheduler
from engine.sequence import Plan
from engine.shrink import OutOfMemory

log = logging.getLogger(__name__)


class Flights:
    """Whatever a step raises ends its requests, never the engine."""

    def __init__(self, runner: Runner, scheduler: Scheduler):
        self._runner, self._scheduler = runner, scheduler
        self._steps: deque[tuple[Plan, Handle]] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def launch(self, plan: Plan, sinks: Mapping[str, KVSink]) -> list[Event]:
        """Starts a step. The events are of steps that ended meanwhile: of all, if this one found no memory."""
        try:
            self._steps.append((plan, self._runner.launch(plan, sinks)))
            return []
        except OutOfMemory as error:
            announced = error.announced
        except Exception as error:
            return self._lose(plan, error)
        log.warning("no memory for a step of %d tokens: it is cut", sum(row.num_tokens for row in plan.rows))
        # Smaller steps overwrite the tokens that only the device knows, so those before come first.
        return [*self.take_in(), *self._compute_in_parts(plan, sinks, announced)]

    def take_in(self, ahead: int = 0) -> list[Event]:
        """The results of all but the last `ahead` steps; waits for them."""
        events: list[Event] = []
        while len(self._steps) > ahead:
            plan, handle = self._steps.popleft()
            try:
                results = handle.result()
            except Exception as error:
                events += self._lose(plan, error)
            else:
                events += self._scheduler.update(plan, results)
        return events

    def _compute_in_parts(self, plan: Plan, sinks: Mapping[str, KVSink], announced: set[int]) -> list[Event]:
        try:
            results = self._runner.compute_in_parts(plan, sinks, announced)
        except Exception as error:
            return self._lose(plan, error)
        return self._scheduler.update(plan, results)

    def _lose(self, plan: Plan, error: Exception) -> list[Event]:
        log.error("a step of %d rows failed", len(plan.rows), exc_info=error)
        return self._scheduler.fail(plan, "INTERNAL", f"the step failed: {type(error).__name__}: {error}")
