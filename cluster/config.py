"""One deployment: its model, pools, router and transport. What the YAML file says, what `pdserve config schema` prints.

    model: {path: smollm2}
    pools:
      prefill: {replicas: 1, label_selector: {gpu: h200}}
      decode: {replicas: 2}
    router: {port: 8700}

`load()` in cluster/config_file.py reads it. Every key is checked here; unknown ones are errors.
"""

from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from cluster.models import DEMO_MODEL, DEMO_NAME
from router.config import Limits, RouterConfig

PoolName = Literal["prefill", "decode", "colocated"]
ROLES: dict[PoolName, Literal["prefill", "decode", "both"]] = {
    "prefill": "prefill",
    "decode": "decode",
    "colocated": "both",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())


class ModelConfig(Section):
    path: str = Field(default=DEMO_MODEL, min_length=1, description="directory, hub id, or 'smollm2' (the demo model)")
    served_name: str = Field(default="", description="name clients use; default: the last part of path")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="auto: float32 on CPU")
    kv_cache_dtype: Literal["auto", "fp8"] = Field(default="auto", description="fp8: half of bfloat16's KV bytes")
    load_format: Literal["auto", "safetensors", "dummy"] = Field(default="auto", description="dummy: random weights")
    max_model_len: int | None = Field(
        default=None, ge=16, description="tokens, prompt and output; default: the model's own"
    )

    @property
    def name(self) -> str:
        if self.served_name:
            return self.served_name
        return DEMO_NAME if self.path == DEMO_MODEL else self.path.rstrip("/").rsplit("/", 1)[-1]


class Placement(Section):
    """What Ray must find on a node before an actor goes there."""

    num_cpus: float = Field(default=0, ge=0, description="CPUs reserved in Ray; 0: none, processes share the node")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default={}, description="custom Ray resources")
    label_selector: dict[str, str] = Field(default={}, description="Ray node labels, such as {zone: a} or {zone: '!a'}")


class PoolConfig(Placement):
    """Workers of one role, tuned and scaled apart from the other pools."""

    replicas: int = Field(default=0, ge=0, le=1024)
    num_gpus: float = Field(default=0, ge=0, description="GPUs per worker; 0: CPU")
    num_threads: int | None = Field(
        default=None, ge=1, description="torch threads; default: the node's cores shared out"
    )
    block_size: int | None = Field(
        default=None, ge=16, le=1024, multiple_of=16, description="tokens per KV block; default 16, CUDA 64"
    )
    num_blocks: int | None = Field(
        default=None, ge=2, description="KV blocks; default: from kv_cache_gib, CUDA free memory"
    )
    kv_cache_gib: float | None = Field(default=None, gt=0, description="default on CPU: 1")
    gpu_memory_utilization: float = Field(default=0.92, gt=0, le=1)
    kv_cache_dtype: Literal["auto", "fp8"] | None = Field(
        default=None,
        description="default: the model's; fp8 in the decode pool alone: prompts computed in full, rounded on the way",
    )
    max_num_batched_tokens: int = Field(default=2048, ge=1, description="tokens computed in one step")
    max_num_seqs: int = Field(default=64, ge=1, description="sequences in the running batch")
    fuse: bool = Field(default=True, description="CUDA: rebuild known decoder layers from fused kernels")
    cuda_graphs: bool = Field(default=True, description="CUDA: replay whole decode steps")
    env: dict[str, str] = Field(default={}, description="environment variables of the worker processes")

    @field_validator("num_gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("must be a whole number, or a share within (0, 1)")
        return value


class Pools(Section):
    prefill: PoolConfig = Field(default=PoolConfig(replicas=1), description="computes prompts")
    decode: PoolConfig = Field(default=PoolConfig(replicas=1), description="generates tokens")
    colocated: PoolConfig = Field(default=PoolConfig(replicas=0), description="workers that do both")

    @model_validator(mode="before")
    @classmethod
    def _one_replica_unless_said(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        counts = {"prefill": 1, "decode": 1, "colocated": 0}
        return {
            name: {"replicas": counts[name], **pool} if name in counts and isinstance(pool, dict) else pool
            for name, pool in data.items()
        }

    @model_validator(mode="after")
    def _can_serve(self) -> "Pools":
        problem = missing_half({name: self[name].replicas for name in ROLES})
        if problem:
            raise ValueError(problem)
        return self

    def __getitem__(self, name: PoolName) -> PoolConfig:
        return getattr(self, name)


def missing_half(replicas: dict[PoolName, int]) -> str:
    """Why pools of these sizes cannot serve a request; empty if they can."""
    if replicas["colocated"] or (replicas["prefill"] and replicas["decode"]):
        return ""
    sizes = ", ".join(f"{name}={count}" for name, count in replicas.items())
    return f"at least one prefill and one decode worker (or one colocated) are needed; got {sizes}"


def _mirror(config: type, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a layer's own frozen dataclass, so that its defaults are written down once."""
    return {f.name: (f.type, f.default) for f in fields(config) if f.name not in leave and f.default is not MISSING}


LimitsSection: type[Section] = create_model("LimitsSection", __base__=Section, **_mirror(Limits))
_RouterFields: type[Placement] = create_model(
    "_RouterFields", __base__=Placement, **_mirror(RouterConfig, leave=("limits", "host", "port", "router_id"))
)


class RouterSection(_RouterFields):  # type: ignore[valid-type, misc]
    host: str = Field(default="127.0.0.1", min_length=1, description="address it listens on; 0.0.0.0: every interface")
    port: int = Field(default=8700, ge=0, le=65535, description="0: any free one")
    limits: LimitsSection = Field(default=LimitsSection(), description="what a request may ask for")  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _within_the_routers_own_ranges(self) -> "RouterSection":
        self.to_config("any")
        return self

    def to_config(self, served_model_name: str) -> RouterConfig:
        known = {f.name for f in fields(RouterConfig)}
        values = {key: value for key, value in self if key in known and key != "limits"}
        limits = Limits(**self.limits.model_dump())  # type: ignore[attr-defined]
        return RouterConfig(served_model_name=served_model_name, limits=limits, **values)


class DeploymentConfig(Section):
    name: str = Field(
        default="default", pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$", description="of this deployment"
    )
    model: ModelConfig = ModelConfig()
    pools: Pools = Pools()
    router: RouterSection = RouterSection()
    transport: Literal["auto", "cuda_ipc", "nixl", "grpc", "ray_store"] = Field(
        default="auto", description="how KV moves from prefill to decode; auto: the best that each pair of workers has"
    )
    enable_prefix_caching: bool = True
    kv_return: bool = Field(
        default=False, description="on: after each turn the answer's KV goes back to the prefill worker's prefix cache"
    )
    drain_timeout_s: float = Field(default=3600, gt=0, description="a drained worker is stopped after so long")
    placement_timeout_s: float = Field(default=60, gt=0, description="`up` waits so long for resources")
    startup_timeout_s: float = Field(
        default=900, gt=0, description="a placed worker may take so long until it is ready"
    )
    fence_timeout_s: float = Field(
        default=30, gt=0, description="a worker that does not end its writes into a peer's pool is killed after so long"
    )
    runtime_env: dict[str, Any] = Field(
        default={},
        description="Ray runtime_env of all actors, such as {working_dir: .}; default: pdserve is on the nodes",
    )

    @model_validator(mode="after")
    def _kv_can_be_handed_over(self) -> "DeploymentConfig":
        prefill, decode = self.kv_cache_dtype("prefill"), self.kv_cache_dtype("decode")
        if prefill == "fp8" and decode != "fp8":
            raise ValueError(f"prefill keeps fp8 and decode {decode}: KV is rounded on the way, never back")
        if self.kv_return and prefill != decode:
            raise ValueError(f"kv_return: prefill keeps {prefill} and decode {decode}: what was rounded cannot go back")
        return self

    def kv_cache_dtype(self, pool: PoolName) -> str:
        return self.pools[pool].kv_cache_dtype or self.model.kv_cache_dtype

    @property
    def namespace(self) -> str:
        """The Ray namespace of this deployment's actors."""
        return namespace(self.name)

    def targets(self) -> dict[PoolName, int]:
        return {name: self.pools[name].replicas for name in ROLES}


def namespace(deployment: str) -> str:
    return f"pdserve-{deployment}"
