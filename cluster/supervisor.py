"""Keeps one actor alive: places it, follows its start, notices its death, puts a fresh one in its place, ends it.

    placing -> starting -> loading -> joining -> ready -> draining -> stopped
       ^          |           |          |         |
       |          v           v          v         v
       +--------- failed (the actor's own error) or lost (died)      after a pause that grows while it keeps failing

It joins while everybody is told of it: "ready" means that requests reach it.

Each life is another actor with another name and incarnation; Ray's own restarts are off, because a restarted process
would come back under the old handle before anyone knows that its model is not loaded.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from protos import worker_pb2

_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_STEADY_S = 60.0  # a life this long makes the next failure the first again
_HEARTBEAT_S = 5.0
_SILENCE_S = 15.0
_STOP_S = 10.0
_ALIVE = ("joining", "ready", "draining")
_log = logging.getLogger(__name__)


class Spec(Protocol):
    @property
    def restarts(self) -> int: ...
    @property
    def actor_name(self) -> str: ...


class Supervisor:
    """One worker id (or the router). Its owner hears of every change, and publishes membership when told to."""

    def __init__(
        self,
        name: str,
        create: Callable[[Any], Any],
        spec: Callable[[int], Spec],
        startup_timeout_s: float,
        touched: Callable[[], None],
        publish: Callable[[], Awaitable[None]],
        reported: Callable[[dict[str, Any]], None],
    ) -> None:
        self.name = name
        self.state = "placing"
        self.detail = ""
        self.restarts = 0
        self.handle: Any = None
        self.where: dict[str, Any] = {}  # pid, node_id, host
        self.ready: dict[str, Any] = {}  # what start() ended with
        self.member: worker_pb2.Member | None = None  # while a lost worker's successor starts: STARTING, no address
        self.report: dict[str, Any] = {}
        self.retiring = False
        self.last_error = ""
        self._create = create
        self._spec = spec
        self._startup_timeout_s = startup_timeout_s
        self._touched = touched
        self._publish = publish
        self._reported = reported
        self._verdict: asyncio.Future[str] | None = None
        self._task: asyncio.Task[None] | None = None

    def run(self) -> None:
        self._task = asyncio.create_task(self._lives(adopted=False), name=f"supervise {self.name}")

    def adopt(self, handle: Any, identity: dict[str, Any]) -> None:
        """Goes on with a ready actor that an earlier controller created."""
        self.handle = handle
        self.restarts = identity["spec"].restarts
        self.where = {key: identity[key] for key in ("pid", "node_id", "host")}
        self._join(identity["ready"])
        self._task = asyncio.create_task(self._lives(adopted=True), name=f"supervise {self.name}")

    def condemn(self, why: str) -> None:
        """Ends the life that it has now, as if it had died."""
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(why)

    async def retire(self, drain_timeout_s: float | None) -> None:
        """Ends it for good; with a drain timeout, after everybody was told and its last run is over."""
        self.retiring = True
        was_alive = self.state in _ALIVE
        if was_alive and drain_timeout_s is not None:
            self._set("draining")
            if self.member is not None:
                self.member.state = worker_pb2.WORKER_STATE_DRAINING
            await self._publish()
            try:
                await asyncio.wait_for(result_of(self.handle.drain.remote()), drain_timeout_s)
            except TimeoutError:
                _log.warning("%s still had work after %s s of draining", self.name, drain_timeout_s)
            except RayError as error:
                _log.warning("%s died while draining: %s", self.name, explain(error))
        await self._stop_supervising()
        had_member, self.member = self.member is not None, None
        if had_member:
            await self._publish()
        if was_alive:
            with contextlib.suppress(TimeoutError, RayError):
                await asyncio.wait_for(result_of(self.handle.stop.remote()), _STOP_S)
        self._kill()
        self._set("stopped")

    async def refresh(self, within_s: float) -> None:
        """A fresh report, or the last one if the actor does not answer in time."""
        if self.state in _ALIVE:
            with contextlib.suppress(TimeoutError, RayError):
                self.report = await asyncio.wait_for(result_of(self.handle.report.remote()), within_s)
                self._reported(self.report)

    async def tell_members(self, members: bytes, within_s: float) -> None:
        if self.state not in _ALIVE:
            return
        try:
            await asyncio.wait_for(result_of(self.handle.set_members.remote(members)), within_s)
        except (TimeoutError, RayError) as error:  # the supervision will see why; the next push repeats it all
            _log.warning("%s did not take the new membership: %s", self.name, explain(error))

    async def _lives(self, adopted: bool) -> None:
        failures = 0
        while True:
            born = time.monotonic()
            if adopted:
                adopted = False
            elif not await self._start():
                if self.member is not None:  # nobody is to wait for it any longer
                    self.member = None
                    await self._publish()
                self.restarts += 1
                failures += 1
                await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
                continue
            await self._publish()
            if not self.retiring:
                self._set("ready")
            self.last_error = await self._until_unfit()
            if self.retiring:
                return
            _log.warning("%s is lost: %s", self.name, self.last_error)
            self._kill()
            if self.member is not None:
                self.member = worker_pb2.Member(
                    worker_id=self.name, role=self.member.role, state=worker_pb2.WORKER_STATE_STARTING
                )
            self._set("lost", self.last_error)
            await self._publish()
            failures = 0 if time.monotonic() - born > _STEADY_S else failures + 1
            self.restarts += 1
            await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S)) - 1] if failures else 0)

    async def _start(self) -> bool:
        """One actor from placing to ready. False, with the error in `detail`, if it failed."""
        self._set("placing")
        self.report, self.where = {}, {}
        try:
            self.handle = self._create(self._spec(self.restarts))
            updates = self.handle.start.options(num_returns="streaming").remote()
            first = await result_of(await anext(updates))  # waits as long as no node takes it
            self.where = {key: first[key] for key in ("pid", "node_id", "host")}
            self._set("starting")
            async with asyncio.timeout(self._startup_timeout_s):
                async for reference in updates:
                    update = await result_of(reference)
                    if update["state"] == "ready":
                        self._join(update)
                        return True
                    self._set(update["state"], update["detail"])
            error = self.detail
        except TimeoutError:
            error = f"not ready {self._startup_timeout_s:g} s after it was placed; last seen: {self.detail}"
        except Exception as caught:  # whatever is wrong with this life, the next may do better
            error = explain(caught)
        self.last_error = error
        _log.warning("%s did not start: %s", self.name, error)
        self._kill()
        self.ready = {}
        self._set("failed", error)
        return False

    async def _until_unfit(self) -> str:
        """Why the actor cannot go on: its death, its own word, its silence, or another's verdict."""
        watch = asyncio.ensure_future(result_of(self.handle.watch.remote()))
        self._verdict = asyncio.get_running_loop().create_future()
        ends = asyncio.FIRST_COMPLETED
        try:
            while True:
                done, _ = await asyncio.wait({watch, self._verdict}, timeout=_HEARTBEAT_S, return_when=ends)
                if done:
                    return done.pop().result()
                self.report = await asyncio.wait_for(result_of(self.handle.report.remote()), _SILENCE_S)
                self._reported(self.report)
        except TimeoutError:
            return f"no answer for {_SILENCE_S:g} s"
        except RayError as error:
            return explain(error)
        finally:
            watch.cancel()

    def _join(self, ready: dict[str, Any]) -> None:
        self.ready = ready
        if "member" in ready:
            self.member = worker_pb2.Member.FromString(ready["member"])
        self._set("joining")

    async def _stop_supervising(self) -> None:
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _kill(self) -> None:
        if self.handle is not None:
            ray.kill(self.handle)

    def _set(self, state: str, detail: str = "") -> None:
        self.state, self.detail = state, detail
        self._touched()


async def result_of(reference: Any) -> Any:
    """Awaiting a Ray reference in a coroutine of its own, since wait_for and ensure_future take no bare ones."""
    return await reference


def explain(error: BaseException) -> str:
    """The cause in one line, as its author put it: without Ray's frame around it."""
    if isinstance(error, RayTaskError):
        return (
            str(error.cause) if isinstance(error.cause, ValueError) else f"{type(error.cause).__name__}: {error.cause}"
        )
    text = str(error).strip()
    if isinstance(error, RayActorError):
        if detail := re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", text, re.DOTALL):
            return f"the process died: {' '.join(detail[1].split())}"
        if "node has died" in text:
            return "its node died"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__
    return text or type(error).__name__
