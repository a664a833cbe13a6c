"""The workers this router may use, as membership and their own streams tell."""

import asyncio
from collections.abc import Callable, Iterable

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from router.affinity import Affinity
from router.config import RouterConfig
from router.errors import RequestError
from router.policy import Need, Route, choose
from router.worker_client import WorkerClient


class Pool:
    """Clients by worker id; a new incarnation is a new client. `on_change` hears of every change of readiness."""

    def __init__(self, config: RouterConfig, on_change: Callable[[], None]):
        self.workers: dict[str, WorkerClient] = {}
        self.affinity = Affinity(config.affinity_tokens)
        self._config = config
        self._on_change = on_change
        self._coming: set[int] = set()  # roles of members without an address: dead workers about to be replaced
        self._changed = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()

    def set_members(self, members: Iterable[wpb.Member]) -> None:
        """Makes the pool equal to `members`. Runs on a worker that is gone fail over; draining ones keep theirs."""
        members = [m for m in members if m.state != wpb.WORKER_STATE_STOPPED]
        wanted = {m.worker_id: m for m in members if m.address}
        self._coming = {m.role for m in members if not m.address and m.state == wpb.WORKER_STATE_STARTING}
        for worker_id, client in list(self.workers.items()):
            member = wanted.get(worker_id)
            if member is None or _identity(member) != _identity(client.member):
                del self.workers[worker_id]
                self._close(client, "it left the membership")
        for worker_id, member in wanted.items():
            known = self.workers.get(worker_id)
            if known is not None:
                known.member = member
            else:
                self.workers[worker_id] = client = WorkerClient(member, self._config, self._changes)
                client.start()
        self._changes()

    async def close(self) -> None:
        for client in list(self.workers.values()):
            self._close(client, "the router stops")
        self.workers.clear()
        await asyncio.gather(*self._closing)

    @property
    def is_ready(self) -> bool:
        """Whether some route exists: a prefill and a decode worker, or one that does both."""
        prefill, decode = self.num_ready()
        return prefill > 0 and decode > 0

    def num_ready(self) -> tuple[int, int]:
        """Workers that take prompts, and workers that take decodes; colocated ones count for both."""
        ready = [w for w in self.workers.values() if w.takes_work]
        both = sum(w.is_colocated for w in ready)
        return sum(w.can_prefill for w in ready) + both, sum(w.can_decode for w in ready) + both

    def max_model_len(self, checkpoint: int) -> int:
        """The context that every connected worker serves; the checkpoint's own while none has said."""
        said = [w.info.model.max_model_len for w in self.workers.values() if w.info is not None]
        return min([n for n in said if n] + [checkpoint])

    async def route(
        self, need: Need, avoid: frozenset[str], full: frozenset[str], wait_s: float, wait_for_any: bool
    ) -> Route:
        """A route for a run, waiting at most `wait_s` for healthy workers.

        Waits only while workers that could make one are starting, restarting or just lost, or with `wait_for_any` for
        whatever may come. NO_HEALTHY_WORKER then.
        """
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            found = choose(tuple(self.workers.values()), need, self._config, avoid, full)
            if found is not None:
                return found
            if not wait_for_any and not self._may_serve(need):
                raise self._none_healthy()
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise self._none_healthy() from None

    def check(self) -> None:
        for client in self.workers.values():
            client.check()

    def _may_serve(self, need: Need) -> bool:
        known = {w.member.role for w in self.workers.values() if w.takes_work or w.may_become_ready}
        roles = known | self._coming
        if wpb.WORKER_ROLE_BOTH in roles:
            return True
        return wpb.WORKER_ROLE_PREFILL in roles and (need.first_token_only or wpb.WORKER_ROLE_DECODE in roles)

    def _none_healthy(self) -> RequestError:
        prefill, decode = self.num_ready()
        return RequestError(
            pb.ERROR_REASON_NO_HEALTHY_WORKER,
            f"no healthy worker: {prefill} prefill and {decode} decode workers are ready of {len(self.workers)} known",
        )

    def _changes(self) -> None:
        self._changed.set()
        self._on_change()

    def _close(self, client: WorkerClient, why: str) -> None:
        task = asyncio.create_task(client.close(why))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _identity(member: wpb.Member) -> tuple[str, str, int]:
    return member.incarnation, member.address, member.role
