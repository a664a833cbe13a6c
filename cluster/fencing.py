"""Ends workers that neither fence what they write into a peer's pool nor answer for it.

Life of a silent writer here
1. A worker's report names whom its quarantined pages wait for (decode_worker/fencing.py), with process and age.
2. A member gets `fence_timeout_s` to end its writes; then its supervisor puts another in its place.
3. Somebody on its host has to see its process end, kill it if need be: a task on every node is asked, and the one that
   shares host and pid namespace with it can tell. Ray's own word is not enough, a stopped process outlives it.
4. A host that no node of the cluster is on any more cannot be asked. What lived there ends itself when its raylet has
   ended (cluster/actors.py), and a raylet ends without its head, so after a while nothing of it is left.
5. Whoever waits for it hears that it has ended, and frees the pages.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.supervisor import Supervisor, explain, result_of

_END_S = 10.0
_ASK_S = 60.0  # the task's process may have to start
# Ray ends a raylet that has not reached the head for 60 s; its workers leave within 32 s of that.
HOST_LOST_S = 120.0
_log = logging.getLogger(__name__)


class Fencing:
    """Of one deployment. `num_killed`: members that were put an end to, since this controller began."""

    def __init__(
        self,
        workers: Mapping[str, Supervisor],
        timeout_s: float,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        end: "Callable[[str], Coroutine[Any, Any, bool | None]] | None" = None,
    ) -> None:
        """`end` stands in for the cluster in tests: whether a process has ended, None if its host is not there."""
        self.num_killed = 0
        self._workers = workers
        self._timeout_s = timeout_s
        self._spawn = spawn
        self._end = end or end_process
        self._ending: set[tuple[str, str]] = set()
        self._lost_since_s: dict[tuple[str, str], float] = {}  # no node is on its host

    def look(self, report: Mapping[str, Any]) -> None:
        """A worker's report has come."""
        for writer in report.get("silent_writers", ()):
            source = writer["worker_id"], writer["incarnation"]
            supervisor = self._workers.get(writer["worker_id"])
            member = supervisor.member if supervisor is not None else None
            is_member = member is not None and member.incarnation == writer["incarnation"]
            if source in self._ending or (is_member and writer["age_s"] < self._timeout_s):
                continue
            if not writer["process"].partition(":")[0]:  # it does not know where it runs: nobody can see it end
                continue
            if is_member and supervisor is not None:
                supervisor.condemn(f"its writes into another worker's pool had not ended after {self._timeout_s:g} s")
                self.num_killed += 1
            self._ending.add(source)
            self._spawn(self._see_end(source, writer["process"]))

    async def _see_end(self, source: tuple[str, str], process: str) -> None:
        try:
            has_ended = await self._end(process)
            if has_ended is None:
                since_s = self._lost_since_s.setdefault(source, time.monotonic())
                has_ended = time.monotonic() - since_s >= HOST_LOST_S
            if not has_ended:  # the next report asks again
                return
            self._lost_since_s.pop(source, None)
            handles = [one.handle for one in self._workers.values() if one.member is not None and one.member.address]
            told = [result_of(handle.writer_ended.remote(*source)) for handle in handles]
            for error in await asyncio.gather(*told, return_exceptions=True):
                if isinstance(error, RayError):
                    _log.info("a worker did not hear of the end of %s (%s): %s", *source, explain(error))
        finally:
            self._ending.discard(source)


async def end_process(process: str) -> bool | None:
    """Ends a worker's process, wherever in the cluster it is. True: it has ended; None: no node is where it was."""
    nodes = [node["NodeID"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    asked = [
        result_of(
            _end_here.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(process)
        )
        for node in nodes
    ]
    answers = await asyncio.gather(*(asyncio.wait_for(one, _ASK_S) for one in asked), return_exceptions=True)
    for node, answer in zip(nodes, answers, strict=True):
        if isinstance(answer, BaseException):
            _log.warning("node %s could not be asked for process %s: %s", node, process, explain(answer))
    if any(answer is True for answer in answers):
        return True
    return None if all(answer is None for answer in answers) else False


@ray.remote(num_cpus=0, max_retries=0)
def _end_here(process: str) -> bool | None:
    from kv_transfer import locality

    return locality.end(process, _END_S) if locality.is_here(process) else None
