"""The two Ray actors: thin shells that give a Worker or a Router its own process. Requests never pass through them.

An actor's life, driven by the controller: start() streams what it is doing and ends with "ready" or "failed";
set_members() tells it about its peers, watch() stays pending until it is unfit to go on, drain() and stop() end it.
"""

import asyncio
import gc
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil
import ray

from cluster.config import namespace
from cluster.spec import RouterSpec, WorkerSpec
from engine.imports import no_collections
from protos.worker_pb2 import Members

CONTROLLER = "controller"
_PROGRESS_S = 0.25  # how often a loading worker's progress line is looked at
_HEALTH_S = 1.0
_UNHEALTHY_S = 3.0  # an engine may miss its heartbeat for so long before the worker is given up
_PARENT_S = 2.0
_CONTROLLER_S = 30.0
_LAST_RUNS_S = 30.0  # an orphan finishes what it has, for so long
_log = logging.getLogger(__name__)


class _Actor:
    """What both kinds share: start with progress, membership, stop, and no life without a node or a controller."""

    def __init__(self, spec: WorkerSpec | RouterSpec) -> None:
        context = ray.get_runtime_context()
        self._spec = spec
        self._node_id = context.get_node_id()
        self._host = ray.util.get_node_ip_address()
        self._hosted: Any = None
        self._ready: dict[str, Any] | None = None
        self._progress = ""
        self._draining = False
        self._heard_at = time.monotonic()  # from the controller, which asks every few seconds
        _watch_for_orphanhood(spec.deployment, asyncio.get_running_loop(), self._leave, lambda: self._heard_at)

    async def start(self) -> AsyncIterator[dict[str, Any]]:
        """Streams {state, detail}: "starting", "loading" as it goes on, then "ready" with the result or "failed"."""
        yield {"state": "starting", "detail": "", **self._where()}
        task = asyncio.create_task(self._start())
        said = ""
        while not task.done():
            await asyncio.wait({task}, timeout=_PROGRESS_S)
            progress = getattr(self._hosted, "progress", self._progress)
            if progress not in (said, "", "placing") and not task.done():
                said = progress
                yield {"state": "loading", "detail": progress}
        error = task.exception()
        if error is not None:
            _log.error("start of %s failed", self._spec.actor_name, exc_info=error)
            yield {"state": "failed", "detail": _own_words(error)}
            return
        self._ready = task.result()
        yield {"state": "ready", "detail": "", **self._ready}

    async def _start(self) -> dict[str, Any]:
        raise NotImplementedError

    async def identity(self) -> dict[str, Any]:
        """For a controller that comes back and finds this actor: what start() told the one before."""
        return {"spec": self._spec, "ready": self._ready, "draining": self._draining, **self._where()}

    async def set_members(self, members: bytes) -> None:
        if self._hosted is not None:
            self._hosted.set_members(list(Members.FromString(members).members))

    async def report(self) -> dict[str, Any]:
        self._heard_at = time.monotonic()
        status = self._hosted.status() if self._ready else {}
        return {**status, "rss_bytes": psutil.Process().memory_info().rss}

    async def watch(self) -> str:
        """Pending as long as all is well, so its caller hears of this process's death at once."""
        await asyncio.Event().wait()
        return ""

    async def drain(self) -> None:
        """Returns when nothing is left to do."""
        self._draining = True
        if self._ready:
            await self._hosted.drain()

    async def stop(self) -> None:
        if self._hosted is not None:
            await self._hosted.stop()

    def _where(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "node_id": self._node_id, "host": self._host}

    def _say(self, line: str) -> None:
        self._progress = line

    async def _leave(self, reason: str) -> None:
        _log.warning("%s: %s; leaving", self._spec.actor_name, reason)
        try:
            await asyncio.wait_for(self.drain(), _LAST_RUNS_S)
        finally:
            os._exit(0)


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=1000)
class WorkerActor(_Actor):
    _spec: WorkerSpec

    async def _start(self) -> dict[str, Any]:
        # Three threads share this process's interpreter: at the default 5 ms each hand-over costs an engine step.
        sys.setswitchinterval(2e-4)
        with no_collections():  # the imports of torch among it
            build = _named(self._spec.builder)
            self._hosted = await asyncio.to_thread(build, self._spec, self._host, self._say)
            member = await self._hosted.start()
        _settle()
        return {"member": member.SerializeToString()}

    async def watch(self) -> str:
        """Returns why this worker is unfit to go on: its engine has stopped giving signs of life."""
        unhealthy_s = 0.0
        while unhealthy_s < _UNHEALTHY_S:
            await asyncio.sleep(_HEALTH_S)
            unhealthy_s = 0.0 if self._hosted.is_fit else unhealthy_s + _HEALTH_S
        return "the engine gives no sign of life"

    async def canary(self, target_worker_id: str, num_blocks: int) -> dict[str, Any]:
        return await self._hosted.canary(target_worker_id, num_blocks)

    async def writer_ended(self, worker_id: str, incarnation: str) -> None:
        self._hosted.writer_ended(worker_id, incarnation)

    async def versions(self) -> dict[str, str]:
        """What this process runs on, for the doctor."""
        from importlib.metadata import PackageNotFoundError, version

        found = {"python": ".".join(map(str, sys.version_info[:3]))}
        for package in ("pdserve", "torch", "transformers", "ray", "grpcio", "protobuf"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "not installed"
        return found


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=1000)
class RouterActor(_Actor):
    _spec: RouterSpec

    async def _start(self) -> dict[str, Any]:
        with no_collections():
            build = _named(self._spec.builder)
            self._hosted = await asyncio.to_thread(build, self._spec, self._say)
            address = await self._hosted.start()
        _settle()
        host, _, port = address.rpartition(":")
        # An address that clients elsewhere can use.
        return {"address": f"{self._host}:{port}" if host in ("0.0.0.0", "[::]", "::") else address}


def _settle() -> None:
    """Weights, vocabularies and modules live as long as the process; collections need not walk them."""
    gc.collect()
    gc.freeze()


def _named(builder: str) -> Callable[..., Any]:
    module, _, name = builder.partition(":")
    return getattr(importlib.import_module(module), name)


def _own_words(error: BaseException) -> str:
    text = str(error) or repr(error)
    return text if isinstance(error, ValueError | OSError | RuntimeError) else f"{type(error).__name__}: {text}"


def _watch_for_orphanhood(
    deployment: str, loop: asyncio.AbstractEventLoop, leave: Callable[[str], Any], heard_at: Callable[[], float]
) -> None:
    """Calls leave(reason) once this process has lost its raylet, or its deployment's controller for good.

    Ray ends neither a worker whose raylet died nor a detached actor whose creator was killed. An unreachable head is
    no reason: requests do not need it. `heard_at`: when the controller last asked something; only a silent one is
    looked for, which costs 10 ms.
    """

    def watch() -> None:
        parent = os.getppid()
        never = threading.Event()
        looked_at = time.monotonic()
        missing = 0
        while missing < 2:
            never.wait(_PARENT_S)
            if os.getppid() != parent:
                asyncio.run_coroutine_threadsafe(leave("the node's raylet is gone"), loop)
                return
            if time.monotonic() - max(looked_at, heard_at()) >= _CONTROLLER_S:
                missing = missing + 1 if _is_gone(CONTROLLER, namespace(deployment)) else 0
                looked_at = time.monotonic()
        asyncio.run_coroutine_threadsafe(leave("the deployment's controller is gone"), loop)

    threading.Thread(target=watch, name="orphan-watch", daemon=True).start()


def _is_gone(actor: str, ray_namespace: str) -> bool:
    try:
        ray.get_actor(actor, namespace=ray_namespace)
    except ValueError:
        return True
    except Exception:  # the head does not answer
        return False
    return False
