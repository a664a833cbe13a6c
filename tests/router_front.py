"""A router over stub workers with a client, for tests: `async with routed(model, prefill=2, decode=1) as front`."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from protos import inference_pb2_grpc
from router.config import RouterConfig
from router.server import Router
from tests.stub_workers import StubCluster


@dataclass(slots=True)
class Front:
    """A running router with its stub workers and a client."""

    router: Router
    cluster: StubCluster
    client: Any
    channel: Any

    async def until(self, condition: Callable[[], bool], within_s: float = 5.0) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, self.router.status()
            await asyncio.sleep(0.005)

    async def settled(self) -> None:
        """Nothing is left anywhere: the router's tables, the workers' runs."""
        workers = self.cluster.workers.values()
        await self.until(lambda: not self.router.admission.num_in_flight)
        await self.until(lambda: all(not w.runs for w in workers))
        self.router.check()
        assert all(not c.residents for c in self.router.pool.workers.values())


@asynccontextmanager
async def routed(
    model: Path, prefill: int = 1, decode: int = 1, both: int = 0, wait: bool = True, **config: Any
) -> AsyncIterator[Front]:
    """A router over so many stub workers (p0, p1, ..., d0, ..., b0, ...); at the end all must be settled."""
    async with StubCluster() as cluster:
        for role, count in (("prefill", prefill), ("decode", decode), ("both", both)):
            for i in range(count):
                await cluster.add(f"{role[0]}{i}", role)
        router = Router(RouterConfig(**{"served_model_name": "stub", "load_interval_s": 0.05, **config}), model)
        try:
            address = await router.start()
            router.set_members(cluster.members())
            async with grpc.aio.insecure_channel(address) as channel:
                front = Front(router, cluster, inference_pb2_grpc.InferenceServiceStub(channel), channel)
                clients = router.pool.workers.values
                if wait:
                    await front.until(lambda: all(c.takes_work for c in clients()))
                yield front
                await front.settled()
        finally:
            await router.stop()
