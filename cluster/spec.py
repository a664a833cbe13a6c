"""What an actor is told at its start: plain values, decided by the controller, the same for the actor's whole life."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import ROLES, DeploymentConfig, PoolName


@dataclass(frozen=True, slots=True)
class Factories:
    """Import paths of what the actors host. Tests put fakes here."""

    worker: str = "cluster.worker:Worker"
    router: str = "router.server:Router"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    worker_id: str
    pool: PoolName
    restarts: int  # of this worker id; every life is another actor process and incarnation
    deployment: str
    model: str
    transport: str
    factory: str
    engine: dict[str, Any] = field(default_factory=dict)  # EngineConfig's fields but the model directory

    @property
    def actor_name(self) -> str:
        return f"worker/{self.worker_id}/{self.restarts}"

    @property
    def role(self) -> str:
        return ROLES[self.pool]


@dataclass(frozen=True, slots=True)
class RouterSpec:
    restarts: int
    deployment: str
    model: str
    config: Any  # RouterConfig
    factory: str

    @property
    def actor_name(self) -> str:
        return f"router/{self.restarts}"


def worker_spec(
    config: DeploymentConfig, pool: PoolName, worker_id: str, restarts: int, factories: Factories, num_cores: int
) -> WorkerSpec:
    settings = config.pools[pool]
    engine = {
        "dtype": config.model.dtype,
        "load_format": config.model.load_format,
        "max_model_len": config.model.max_model_len,
        "block_size": settings.block_size,
        "num_blocks": settings.num_blocks,
        "kv_cache_gib": settings.kv_cache_gib,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "enable_prefix_caching": config.enable_prefix_caching,
        "num_threads": num_threads(config, pool, num_cores),
        "served_model_name": config.model.name,
    }
    return WorkerSpec(
        worker_id=worker_id,
        pool=pool,
        restarts=restarts,
        deployment=config.name,
        model=config.model.path,
        transport=config.transport,
        factory=factories.worker,
        engine=engine,
    )


def num_threads(config: DeploymentConfig, pool: PoolName, num_cores: int) -> int:
    """What the pool asks for, the CPUs it reserved in Ray, or an equal share of one node's `num_cores`.

    Two torch threads where one core is free make every matrix product many times slower, so the share is rounded down.
    """
    settings = config.pools[pool]
    if settings.num_threads:
        return settings.num_threads
    if settings.num_cpus >= 1:
        return int(settings.num_cpus)
    return max(1, num_cores // max(1, sum(config.targets().values())))


def create(factory: str) -> Any:
    """The object that "module:name" names."""
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)


def model_directory(model: str, say: Any) -> Path:
    from cluster.models import resolve

    return resolve(model, say)
