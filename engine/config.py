"""What an engine is built from. Every "auto" here is resolved once, at load, from the device and the checkpoint."""

import re
from dataclasses import dataclass

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "fp8")
LOAD_FORMATS = ("auto", "safetensors", "dummy")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Checked on construction: ValueError names the field, its value and the allowed range."""

    model: str  # directory with config.json, and *.safetensors unless load_format is "dummy"
    dtype: str = "auto"  # auto: float32 on CPU, the checkpoint's own on CUDA
    device: str = "auto"  # auto | cpu | cuda | cuda:N; auto takes CUDA when there is one
    load_format: str = "auto"  # dummy: seeded random weights from config.json alone
    block_size: int | None = None  # tokens per KV block, a multiple of 16; None: 16 on CPU, 64 on CUDA
    num_blocks: int | None = None  # None: from kv_cache_gib (1 GiB on CPU), or what CUDA memory allows
    kv_cache_gib: float | None = None
    kv_cache_dtype: str = "auto"  # auto: as the model computes; fp8: e4m3 with scales, half the bytes of bfloat16
    gpu_memory_utilization: float = 0.92
    max_model_len: int | None = None  # None: the model's own, lowered to what the blocks can hold
    max_num_batched_tokens: int = 2048  # tokens computed per step
    max_num_seqs: int = 64  # sequences in the running batch (and never more than tokens per step)
    enable_prefix_caching: bool = True
    num_threads: int | None = None  # torch intra-op threads; None: leave them
    paged: bool | None = None  # our kernels, steps launched ahead of their results; None: on CUDA. On CPU: for tests
    fuse: bool = True  # rebuild known decoder layers from fused kernels
    cuda_graphs: bool = True  # replay whole decode steps
    served_model_name: str = ""  # in the layout and ModelInfo; empty: the directory's name

    def __post_init__(self) -> None:
        def check(field: str, good: bool, allowed: str) -> None:
            if not good:
                raise ValueError(f"{field}: {getattr(self, field)!r} is not {allowed}")

        def optional_int(field: str, low: int, allowed: str) -> None:
            value = getattr(self, field)
            check(field, value is None or (_is_int(value) and value >= low), allowed)

        check("model", isinstance(self.model, str) and bool(self.model), "a directory")
        check("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        check("device", bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(self.device))), "auto, cpu, cuda or cuda:N")
        check("load_format", self.load_format in LOAD_FORMATS, f"one of {', '.join(LOAD_FORMATS)}")
        size = self.block_size
        check(
            "block_size",
            size is None or (_is_int(size) and 16 <= size <= 1024 and size % 16 == 0),
            "a multiple of 16 in [16, 1024]",
        )
        optional_int("num_blocks", 1, "an integer >= 1")
        gib = self.kv_cache_gib
        check("kv_cache_gib", gib is None or 0 < gib < float("inf"), "a positive number")
        check("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "in (0, 1]")
        check("kv_cache_dtype", self.kv_cache_dtype in KV_CACHE_DTYPES, f"one of {', '.join(KV_CACHE_DTYPES)}")
        optional_int("max_model_len", 2, "an integer >= 2")
        check(
            "max_num_batched_tokens",
            _is_int(self.max_num_batched_tokens) and self.max_num_batched_tokens >= 1,
            "an integer >= 1",
        )
        check("max_num_seqs", _is_int(self.max_num_seqs) and self.max_num_seqs >= 1, "an integer >= 1")
        optional_int("num_threads", 1, "an integer >= 1")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
