"""What the actors host, built inside their processes: torch loads here and in no other file of the cluster."""

from collections.abc import Callable
from typing import Any

from cluster.models import resolve
from cluster.spec import RouterSpec, WorkerSpec


def worker(spec: WorkerSpec, host: str, say: Callable[[str], None]) -> Any:
    """A cluster.worker.Worker, not started. Blocks for the imports and, the first time, for the model's files."""
    directory = resolve(spec.model, say)
    say("importing torch")
    from cluster.worker import Worker
    from engine.config import EngineConfig

    object_store = None
    if spec.transport == "ray_store":
        from cluster.object_store import RayObjectStore

        object_store = RayObjectStore()
    engine = EngineConfig(model=str(directory), **spec.engine)
    return Worker(
        spec.worker_id,
        spec.role,  # type: ignore[arg-type]
        engine,
        spec.transport,
        host=host,
        object_store=object_store,
        kv_return=spec.kv_return,
    )


def router(spec: RouterSpec, say: Callable[[str], None]) -> Any:
    """A router.server.Router, not started."""
    directory = resolve(spec.model, say)
    from router.server import Router

    return Router(spec.config, directory)
