"""What the actors host, built inside their processes: torch loads here and in no other file of the cluster."""

import os
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
    engine = EngineConfig(model=str(directory), **{**spec.engine, "device": device(spec.engine["device"])})
    return Worker(
        spec.worker_id,
        spec.role,  # type: ignore[arg-type]
        engine,
        spec.transport,
        host=host,
        object_store=object_store,
        kv_return=spec.kv_return,
        measure_links=True,
    )


def device(name: str) -> str:
    """The GPU that Ray gave this process, by its index among those that the process sees: all of the node's, so that it
    can map the memory of other workers' (see `SEES_ALL_GPUS` in cluster/spec.py)."""
    if name != "cuda":
        return name
    import ray

    mine = str(ray.get_gpu_ids()[0])
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"cuda:{seen.split(',').index(mine) if seen else int(mine)}"


def router(spec: RouterSpec, say: Callable[[str], None]) -> Any:
    """A router.server.Router, not started."""
    directory = resolve(spec.model, say)
    from router.server import Router

    return Router(spec.config, directory)
