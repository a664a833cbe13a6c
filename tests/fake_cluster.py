"""What the actors host in tests of the cluster's own duties: as a Worker or a Router behaves, with nothing behind it.

The model's name tells a fake worker what to do: "fake", or "fake,<role>:<deed>" with the deeds fail (cannot start),
slow (loads for a second), busy (drains for a second), waits (for the first prefill-0 it hears of to end its writes).
"""

import asyncio
import gc
import os
import time
from collections.abc import Callable
from typing import Any

from cluster.spec import Builders, RouterSpec, WorkerSpec
from kv_transfer import locality
from protos import worker_pb2

FAKES = Builders(worker="tests.fake_cluster:worker", router="tests.fake_cluster:router")
_ROLES = {"prefill": 1, "decode": 2, "both": 3}


def worker(spec: WorkerSpec, host: str, say: Callable[[str], None]) -> "FakeWorker":
    return FakeWorker(spec, host)


def router(spec: RouterSpec, say: Callable[[str], None]) -> "FakeRouter":
    return FakeRouter(spec)


class FakeWorker:
    def __init__(self, spec: WorkerSpec, host: str) -> None:
        self.progress = "placing"
        self.state = "starting"
        self._spec = spec
        self._incarnation = locality.process()
        self._waits_for: tuple[str, float] | None = None  # incarnation, since when
        self._ended: list[tuple[str, str]] = []
        self._address = f"{host}:{10000 + os.getpid() % 50000}"
        self._members: dict[str, str] = {}

    async def start(self) -> worker_pb2.Member:
        self.progress = "reading weights"
        if self._does("slow"):
            await asyncio.sleep(1.0)
        if self._does("fail"):
            raise ValueError("num_blocks is 1; the model needs at least 8")
        self.state = "ready"
        return worker_pb2.Member(
            worker_id=self._spec.worker_id,
            incarnation=self._incarnation,
            address=self._address,
            role=_ROLES[self._spec.role],
            state=worker_pb2.WORKER_STATE_READY,
        )

    def set_members(self, members: list[worker_pb2.Member]) -> None:
        self._members = {member.worker_id: member.incarnation for member in members}
        if self._does("waits") and self._waits_for is None and "prefill-0" in self._members:
            self._waits_for = self._members["prefill-0"], time.monotonic()

    def writer_ended(self, worker_id: str, incarnation: str) -> None:
        self._ended.append((worker_id, incarnation))

    async def drain(self) -> None:
        self.state = "draining"
        if self._does("busy"):
            await asyncio.sleep(1.0)

    async def stop(self) -> None:
        self.state = "stopped"

    @property
    def is_fit(self) -> bool:
        return not os.path.exists(f"/tmp/pdserve-fake-unhealthy-{os.getpid()}")

    def status(self) -> dict[str, Any]:
        if not self.is_fit:
            self.state = "unhealthy"
        silent = []
        if self._waits_for is not None and ("prefill-0", self._waits_for[0]) not in self._ended:
            process, since_s = self._waits_for
            age_s = time.monotonic() - since_s
            silent = [{"worker_id": "prefill-0", "incarnation": process, "process": process, "age_s": age_s}]
        return {
            "state": self.state,
            "members": self._members,
            "engine": self._spec.engine,
            "num_running": 0,
            "silent_writers": silent,
            "ended": self._ended,
        }

    async def canary(self, target_worker_id: str, num_blocks: int) -> dict[str, Any]:
        ok = target_worker_id in self._members
        sent = {"transport": "grpc", "why": ""} if ok else {}
        return {"bytes": num_blocks << 20, "seconds": 0.01, "ok": ok, "error": "" if ok else "unknown worker", **sent}

    def _does(self, deed: str) -> bool:
        return f"{self._spec.role}:{deed}" in self._spec.model.split(",")


class FakeRouter:
    """Remembers every membership it was told, as [{worker id: state}]."""

    def __init__(self, spec: RouterSpec) -> None:
        self._port = spec.config.port or 20000 + os.getpid() % 40000
        self._history: list[dict[str, int]] = []

    async def start(self) -> str:
        return f"127.0.0.1:{self._port}"

    def set_members(self, members: list[worker_pb2.Member]) -> None:
        self._history.append({member.worker_id: member.state for member in members})

    async def drain(self) -> None: ...

    async def stop(self) -> None: ...

    def status(self) -> dict[str, Any]:
        return {"history": self._history, "running_requests": 0, "frozen": gc.get_freeze_count()}
