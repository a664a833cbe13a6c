"""The router: pdserve's public gRPC server in front of the worker pools.

Life of a request here:
1. rpc.py parses the bytes; service methods below take the message. Its label is reserved, the queue bound checked.
2. validate.parse checks fields, tokenizer.py makes the prompt's ids (in a thread if long), validate.accept the rest.
3. pipeline.py picks workers (pool.py, policy.py) and starts an attempt.py: Expect to the decode worker's session,
   Prefill to the prefill worker (worker_client.py).
4. First tokens from the prefill worker, then steps from the session, land in sequence.py by strict offsets.
5. The pipeline makes messages of them: detokenizer.py, stop.py; a burst for a slow client becomes one message.
6. The last message carries usage and timings. However it ends, both workers are told and the label is free again.
"""

import asyncio
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import timestamp_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import worker_pb2 as wpb
from router.admission import Admission
from router.config import RouterConfig
from router.model import load_model
from router.pool import Pool
from router.rpc import SERVICE, generic_handler
from router.service import InferenceService
from router.tokenizer import Tokenizer

SWEEP_INTERVAL_S = 1.0
STOP_GRACE_S = 1.0
MAX_METADATA_BYTES = 16 * 1024


class Router:
    """All methods run on one event loop. `start` needs a model directory with config.json and tokenizer.json."""

    def __init__(self, config: RouterConfig, model_dir: Path):
        self.config = config
        self.model = load_model(config.served_model_name, Path(model_dir))
        self.tokenizer = Tokenizer(Path(model_dir))
        self.instance_id = uuid.uuid4().hex
        self.address = ""
        self.started_at = timestamp_pb2.Timestamp()
        self.pool = Pool(config, self._on_pool_change)
        self.admission = Admission(config.limits.max_queued_requests)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server: Any = None
        self._sweeper: asyncio.Task[None] | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._health_stale = asyncio.Event()

    async def start(self) -> str:
        """Serves on config.host:port and returns the address. OSError if the port is taken."""
        self.started_at.GetCurrentTime()
        server = grpc.aio.server(options=_server_options(self.config))
        server.add_generic_rpc_handlers((generic_handler(InferenceService(self)),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            port = server.add_insecure_port(f"{self.config.host}:{self.config.port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self.config.host}:{self.config.port}: {error}") from error
        self._server = server
        await self._set_health()
        await server.start()
        self._sweeper = asyncio.create_task(self._sweep())
        self._health_task = asyncio.create_task(self._publish_health())
        self.address = f"{self.config.host}:{port}"
        return self.address

    def set_members(self, members: Iterable[wpb.Member]) -> None:
        """Makes the pool equal to `members`, by (worker_id, incarnation). Idempotent."""
        self.pool.set_members(members)

    async def drain(self) -> None:
        """Refuses new requests; returns when none is left. Its service turns NOT_SERVING, the server's health stays."""
        self.admission.close()
        self._health_stale.set()
        await self.admission.wait_empty()

    async def stop(self) -> None:
        """Cancels what is running and closes everything. Idempotent."""
        self.admission.close()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S if self.admission.num_in_flight else None)
            self._server = None
        for task in (self._sweeper, self._health_task):
            if task is not None:
                task.cancel()
        await asyncio.gather(*(t for t in (self._sweeper, self._health_task) if t is not None), return_exceptions=True)
        await self.pool.close()

    def status(self) -> dict[str, Any]:
        """Plain values: counts of requests by phase, and each worker as this router sees it."""
        prefill, decode = self.pool.num_ready()
        return {
            "address": self.address,
            "instance_id": self.instance_id,
            "draining": self.admission.is_closed,
            "ready_prefill_workers": prefill,
            "ready_decode_workers": decode,
            "running_requests": self.admission.num_in_flight,
            "phases": self.admission.phases(),
            "workers": {
                worker_id: {
                    "role": wpb.WorkerRole.Name(client.member.role),
                    "connection": client.connection.value,
                    "takes_work": client.takes_work,
                    "runs": len(client.residents),
                    "sequences": client.num_sequences,
                    "queued_prompt_tokens": client.queued_prompt_tokens,
                    "links": {
                        link.worker_id: {"transport": link.transport, "gb_per_s": link.gb_per_s}
                        for link in client.load.links
                    },
                    "error": client.last_error,
                }
                for worker_id, client in self.pool.workers.items()
            },
        }

    def check(self) -> None:
        """Tables agree with each other; without requests in flight all are empty. For tests."""
        self.pool.check()
        runs = self.admission.run_ids()
        for client in self.pool.workers.values():
            assert set(client.residents) <= runs, (client.worker_id, set(client.residents) - runs)

    def _on_pool_change(self) -> None:
        self._health_stale.set()

    async def _publish_health(self) -> None:
        while True:
            await self._health_stale.wait()
            self._health_stale.clear()
            await self._set_health()

    async def _set_health(self) -> None:
        values = health_pb2.HealthCheckResponse
        ready = values.SERVING if self.pool.is_ready else values.NOT_SERVING
        await self._health.set("", ready)
        await self._health.set(SERVICE.full_name, values.NOT_SERVING if self.admission.is_closed else ready)

    async def _sweep(self) -> None:
        """Looks for attempts without progress; one timer for all runs, none per token."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            now = time.monotonic()
            for pipeline in self.admission.pipelines():
                pipeline.check_progress(now)


def _server_options(config: RouterConfig) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", config.limits.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.so_reuseport", 0),  # a taken port is an error, not a second listener
        ("grpc.keepalive_time_ms", 20000),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.ping_timeout_ms", 5000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
    )
