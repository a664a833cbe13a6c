"""What an actor is told at its start: plain values, decided by the controller, the same for the actor's whole life."""

from dataclasses import dataclass, field
from typing import Any

from cluster.config import ROLES, DeploymentConfig, PoolConfig, PoolName
from router.config import RouterConfig

# Ray would hide a worker from the GPUs of the others; transport cuda_ipc maps their memory.
SEES_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


@dataclass(frozen=True, slots=True)
class Builders:
    """Import paths, "module:function", of what builds the things that the actors host. Tests put fakes here."""

    worker: str = "cluster.build:worker"
    router: str = "cluster.build:router"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    worker_id: str
    pool: PoolName
    restarts: int  # of this worker id: each life is another actor process and incarnation
    deployment: str
    model: str
    transport: str
    builder: str
    kv_return: bool = False
    engine: dict[str, Any] = field(default_factory=dict)  # EngineConfig's fields but the model's directory

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
    config: RouterConfig
    builder: str

    @property
    def actor_name(self) -> str:
        return f"router/{self.restarts}"


def worker_spec(
    config: DeploymentConfig, pool: PoolName, worker_id: str, restarts: int, builder: str, num_threads: int
) -> WorkerSpec:
    settings = config.pools[pool]
    engine = {
        "dtype": config.model.dtype,
        "device": "cuda" if settings.num_gpus else "cpu",  # what Ray reserved, not what happens to be visible
        "load_format": config.model.load_format,
        "kv_cache_dtype": config.kv_cache_dtype(pool),
        "max_model_len": config.model.max_model_len,
        "block_size": settings.block_size,
        "num_blocks": settings.num_blocks,
        "kv_cache_gib": settings.kv_cache_gib,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "fuse": settings.fuse,
        "cuda_graphs": settings.cuda_graphs,
        "enable_prefix_caching": config.enable_prefix_caching,
        "num_threads": num_threads,
        "served_model_name": config.model.name,
    }
    return WorkerSpec(
        worker_id=worker_id,
        pool=pool,
        restarts=restarts,
        deployment=config.name,
        model=config.model.path,
        transport=config.transport,
        builder=builder,
        kv_return=config.kv_return,
        engine=engine,
    )


def num_threads(pool: PoolConfig, node_cores: list[int], num_workers: int) -> int:
    """What the pool asks for, the CPUs it reserved in Ray, or an equal share of the machines' cores.

    Two torch threads where one core is free make every matrix product many times slower, so the share is rounded down.
    """
    if pool.num_threads:
        return pool.num_threads
    if pool.num_cpus >= 1:
        return int(pool.num_cpus)
    return max(1, min(sum(node_cores) // max(1, num_workers), max(node_cores, default=1)))
