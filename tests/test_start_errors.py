"""What an engine cannot start with ends in one line that names the setting and the way out. CUDA is simulated."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine.device
from engine.config import EngineConfig
from engine.device import Memory, blocks_that_fit, pick_device, room_for_blocks
from engine.model import load
from engine.runner import Runner
from engine.verify import UnsupportedModel
from tests.engines import Listener, make_engine

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One GPU that answers questions, and nothing else."""
    fake = SimpleNamespace(capability=(9, 0), free=70 * GIB, total=80 * GIB)
    for name, value in dict(
        is_available=lambda: True,
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_device_name=lambda device: "Tesla T4",
        get_device_capability=lambda device: fake.capability,
        mem_get_info=lambda device: (fake.free, fake.total),
        set_device=lambda device: None,
        empty_cache=lambda: None,
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def test_a_gpu_that_is_too_old(gpu: SimpleNamespace) -> None:
    assert pick_device(EngineConfig("m")).type == "cuda"
    gpu.capability = (7, 5)
    with pytest.raises(ValueError, match=r"device: Tesla T4 .* 7\.5, and at least 8\.0 .* set device to cpu"):
        pick_device(EngineConfig("m"))
    assert pick_device(EngineConfig("m", device="cpu")).type == "cpu"


def test_a_gpu_without_float8(gpu: SimpleNamespace) -> None:
    assert pick_device(EngineConfig("m", kv_cache_dtype="fp8")).type == "cuda"
    gpu.capability = (8, 0)
    with pytest.raises(
        ValueError, match=r"kv_cache_dtype: fp8 needs compute capability 8\.9, .* has 8\.0; set it to auto"
    ):
        pick_device(EngineConfig("m", kv_cache_dtype="fp8"))


def test_a_gpu_that_is_not_there(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"device: 'cuda:3' is not in \[cuda:0, cuda:0\]"):
        pick_device(EngineConfig("m", device="cuda:3"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device: 'cuda' is not available: .*; set it to cpu"):
        pick_device(EngineConfig("m", device="cuda"))


def test_no_triton(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.device, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package triton"):
        pick_device(EngineConfig("m", device="cuda"))


def test_no_room_for_one_block() -> None:
    config = EngineConfig("m", gpu_memory_utilization=0.5)
    assert blocks_that_fit(config, GIB, 5 * GIB, "m") == 5
    with pytest.raises(
        ValueError, match=r"gpu_memory_utilization: 0.5 leaves 0.50 GiB .* one block takes 1.000; raise it"
    ):
        blocks_that_fit(config, GIB, GIB // 2, "m")


def test_a_share_is_what_this_engine_takes() -> None:
    def room(utilization: float, start: int, free: int, held: int = 0, step: int = 1, graphs: int = 2) -> int:
        before, now = Memory(start * GIB, 80 * GIB, 3 * GIB), Memory(free * GIB, 80 * GIB, (3 + held) * GIB)
        return room_for_blocks(utilization, before, now, step * GIB, graphs * GIB) // GIB

    assert room(0.5, 79, 64) == 40 - 15 - 1  # graphs on top
    assert room(0.5, 50, 35) == 40 - 15 - 1, "what others hold does not count"
    assert room(0.5, 30, 15) == 15 - 2 - 1, "but it is not there"
    assert room(1.0, 79, 64) == 64 - 2 - 1
    assert room(0.5, 60, 64, held=14) == 40 - 14 - 1, "what others give back meanwhile is not ours"
    assert room(0.5, 60, 64, held=-5) == 40 - 1, "and what an earlier engine of this process gives back"


def test_memory_is_looked_at_once_garbage_is_gone(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier engine in a cycle holds memory until it is collected, and its workspaces until they are cleared."""
    held = {"engine": 30 * GIB, "workspaces": 2 * GIB}

    class Engine:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            held["engine"] = 0

    def answer(*args: object) -> int:
        return sum(held.values())

    monkeypatch.setattr(torch.cuda, "memory_reserved", answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB - answer(), 80 * GIB))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: held.update(workspaces=0), raising=False)
    Engine()
    assert Memory.of(torch.device("cuda:0")) == Memory(50 * GIB, 80 * GIB, 30 * GIB)
    assert Memory.of(torch.device("cuda:0"), collect=True) == Memory(80 * GIB, 80 * GIB, 0)


def test_no_room_for_the_pool_that_was_asked_for(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"kv_cache_gib: 1e-05 is less than one block of 16384 bytes; raise it"):
        make_engine(llama, Listener(), num_blocks=None, kv_cache_gib=1e-5)
    with pytest.raises(ValueError, match=r"num_blocks: 1000000000000 KV blocks of .* find no memory on cpu; lower it"):
        make_engine(llama, Listener(), num_blocks=10**12)
    with pytest.raises(ValueError, match=r"kv_cache_gib: \d+ KV blocks of .* find no memory on cpu; lower it"):
        make_engine(llama, Listener(), num_blocks=None, kv_cache_gib=1e8)


def no_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (simulated)")


def test_no_room_for_the_weights(llama: Path, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.runner, "load", no_memory)
    gpu.free = 3 * GIB
    with pytest.raises(ValueError, match=r"model: the weights of .* find no memory on cuda:0, .* 3.0 of 80.0 GiB free"):
        make_engine(llama, Listener(), device="cuda")


def test_no_room_for_a_step_or_for_graphs(llama: Path, gpu: SimpleNamespace) -> None:
    runner = make_engine(llama, Listener(), paged=True)._runner
    config = EngineConfig(str(llama), max_num_batched_tokens=300, gpu_memory_utilization=0.9)
    runner._peak = no_memory  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"max_num_batched_tokens: a step of 300 tokens .* beside the weights .*; lower it"
    ):
        runner._warm_up(config, True)
    with pytest.raises(
        ValueError, match=r"gpu_memory_utilization: 0.9 leaves no memory for CUDA graphs; lower it, or set"
    ):
        runner._capture(config, SimpleNamespace(capture=no_memory))  # type: ignore[arg-type]


def test_a_step_that_cannot_be_captured(llama: Path) -> None:
    def capture() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might ...")

    runner: Runner = make_engine(llama, Listener(), paged=True)._runner
    with pytest.raises(UnsupportedModel) as raised:
        runner._capture(EngineConfig(str(llama)), SimpleNamespace(capture=capture))  # type: ignore[arg-type]
    assert str(raised.value) == (
        "LlamaForCausalLM: a decode step cannot be captured as a CUDA graph: CUDA error: operation not permitted when "
        "stream is capturing; set cuda_graphs to false to run without"
    )


def test_weights_of_a_type_that_nothing_computes(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = engine.model._build

    def build(*args):
        module = own(*args)
        norm = module.model.norm
        norm.weight = torch.nn.Parameter(norm.weight.to(torch.float8_e4m3fn), requires_grad=False)
        return module

    monkeypatch.setattr(engine.model, "_build", build)
    with pytest.raises(
        UnsupportedModel, match="llama: weights of type float8_e4m3fn are not supported; use a checkpoint in"
    ):
        load(EngineConfig(str(llama)), torch.device("cpu"))
    with pytest.raises(ValueError, match="dtype: 'float64' is not one of auto, float32, bfloat16, float16"):
        EngineConfig(str(llama), dtype="float64")
