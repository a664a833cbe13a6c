"""The device an engine runs on, and how much of its memory is whose. Every refusal is one line that says what to do."""

import gc
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from engine.config import EngineConfig

GRAPH_BYTES = 4 << 20  # what a captured graph of a few hundred kernels takes beside its tensors
OLDEST_FP8 = (8, 9)  # has conversions from and to e4m3
OLDEST = (8, 0)  # compute capability: bfloat16 and the kernels' asynchronous copies


def pick_device(config: EngineConfig) -> torch.device:
    """Raises ValueError for a device that is not there, or on which the kernels cannot run."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} is not available: torch sees no CUDA device; set it to cpu")
    device = torch.device(name if name != "cuda" else f"cuda:{torch.cuda.current_device()}")
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} is not in [cuda:0, cuda:{torch.cuda.device_count() - 1}]")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise ValueError(
            f"device: {torch.cuda.get_device_name(device)} has compute capability {_dotted(capability)}, and at least "
            f"{_dotted(OLDEST)} is needed; set device to cpu"
        )
    if config.kv_cache_dtype == "fp8" and capability < OLDEST_FP8:
        raise ValueError(
            f"kv_cache_dtype: fp8 needs compute capability {_dotted(OLDEST_FP8)}, and "
            f"{torch.cuda.get_device_name(device)} has {_dotted(capability)}; set it to auto"
        )
    if config.paged is not False and find_spec("triton") is None:
        raise ValueError(f"device: {name!r} needs the package triton, which is not installed; or set device to cpu")
    torch.cuda.set_device(device)
    return device


def asked_blocks(config: EngineConfig, block_bytes: int, device: torch.device) -> int | None:
    """The number of KV blocks that the configuration says; None: as many as the device has room for."""
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_gib is None and device.type != "cpu":
        return None
    gib = config.kv_cache_gib or 1.0
    num_blocks = int(gib * 2**30) // block_bytes
    if num_blocks < 1:
        raise ValueError(f"kv_cache_gib: {gib:g} is less than one block of {block_bytes} bytes; raise it")
    return num_blocks


@dataclass(frozen=True, slots=True)
class Memory:
    """A CUDA device's, in bytes, once torch has given back what it had put by."""

    free: int
    total: int
    held: int  # by this process's tensors

    @classmethod
    def of(cls, device: torch.device, collect: bool = False) -> "Memory":
        """`collect`: first what earlier engines of this process have left as garbage."""
        if torch.cuda.memory_reserved(device):
            if collect:
                gc.collect()
            torch._C._cuda_clearCublasWorkspaces()  # one for every thread that has multiplied anything
            torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return cls(free, total, torch.cuda.memory_reserved(device))


def room_for_blocks(utilization: float, before: Memory, now: Memory, step: int, graphs: int) -> int:
    """Bytes for the KV cache; `before` is from before the weights came.

    As in vLLM the share covers what this engine takes: weights, cache and the largest step. What was held before,
    CUDA's own context included, does not count, and captured graphs come on top; but all must find its place. What
    others give back meanwhile is nobody's share: then this process's own count says what was taken.
    """
    taken = max(before.free - now.free, now.held - before.held, 0)
    return min(int(now.total * utilization) - taken, now.free - graphs) - step


def blocks_that_fit(config: EngineConfig, block_bytes: int, room: int, model: str) -> int:
    if room < block_bytes:
        raise ValueError(
            f"gpu_memory_utilization: {config.gpu_memory_utilization} leaves {room / 2**30:.2f} GiB for the KV cache "
            f"of {model}, and one block takes {block_bytes / 2**30:.3f}; raise it (at most 1.0), lower "
            "max_num_batched_tokens, or free memory that other processes hold on the device"
        )
    return room // block_bytes


def no_room_for(config: EngineConfig, num_blocks: int, block_bytes: int, device: torch.device) -> ValueError:
    field = next((name for name in ("num_blocks", "kv_cache_gib") if getattr(config, name)), "gpu_memory_utilization")
    size = num_blocks * block_bytes / 2**30
    return ValueError(f"{field}: {num_blocks} KV blocks of {size:.4g} GiB in all find no memory on {device}; lower it")


def no_room_for_weights(config: EngineConfig, device: torch.device) -> ValueError:
    free, total = (x / 2**30 for x in torch.cuda.mem_get_info(device))
    return ValueError(
        f"model: the weights of {config.served_model_name or config.model} find no memory on {device}, which has "
        f"{free:.1f} of {total:.1f} GiB free; choose a smaller dtype or model, or free the device"
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
