"""The same engine on a CUDA device: the CPU's tokens in float32, its hand-off, and a pool sized from free memory."""

from pathlib import Path

import pytest
import torch

from tests.engines import KINDS, Listener, assert_idle, checkpoint, greedy, make_engine, prompt, run, sampled
from tests.handoff import Handoff
from tests.test_families import FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_equals_cpu(family: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, family, **FAMILIES[family])
    requests = [greedy(str(i), prompt(n, i), 30) for i, n in enumerate((70, 3, 41, 16, 17, 55))]
    requests += [sampled(kind, prompt(30, 40 + i), seed=i, **params) for i, (kind, params) in enumerate(KINDS.items())]
    options = dict(max_num_batched_tokens=33, max_num_seqs=5, block_size=16)
    on_cpu = run(model, requests, **options)
    on_cuda = run(model, requests, device="cuda", **options)
    assert on_cuda.outputs == on_cpu.outputs


def test_disaggregated_equals_colocated_across_devices(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "llama")
    requests = [sampled(f"n{n}", prompt(n, n), num_sequences=2) for n in (31, 64, 100)]
    colocated = run(model, requests)
    la, lb = Listener(), Listener()
    options = dict(max_num_batched_tokens=40, block_size=16)
    with (
        make_engine(model, la, device="cuda", **options) as a,
        make_engine(model, lb, device="cpu", **options) as b,
    ):
        assert a.layout.fingerprint == b.layout.fingerprint
        for request in requests:
            handoff = Handoff(a, b, la, request)
            handoff.start()
            first = handoff.finish()
            lb.wait(request)
            for key, tokens in first.items():
                assert tokens + lb.outputs[key] == colocated.outputs[key]
        assert_idle(a)
        assert_idle(b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pool_from_free_memory_and_half_precision(tmp_path: Path, dtype: str) -> None:
    model = checkpoint(tmp_path, "llama")
    listener, request = Listener(), greedy("x", prompt(40), 20)
    options = dict(num_blocks=None, block_size=None, gpu_memory_utilization=0.5, dtype=dtype)
    with make_engine(model, listener, device="cuda", **options) as engine:
        assert engine.layout.block_size == 64
        total = torch.cuda.get_device_properties(0).total_memory
        assert 0.3 * total < engine.slab.numel() < 0.5 * total
        engine.submit(request)
        listener.wait(request)
        assert_idle(engine)
