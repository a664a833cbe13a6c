"""The same engine on a CUDA device: the CPU's tokens in float32, its hand-off, and a pool sized from free memory."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.model import load
from engine.prove import _Proof, fuse_model
from engine.request import Request, SamplingParams
from engine.runner import Runner
from tests.engines import KINDS, Listener, assert_idle, checkpoint, greedy, make_engine, prompt, run, sampled
from tests.handoff import Handoff
from tests.test_families import FAMILIES
from tests.test_precision import NO_EXPERTS

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


@pytest.mark.parametrize("family", NO_EXPERTS)
def test_fp8_on_cuda_equals_fp8_on_cpu(family: str, tmp_path: Path) -> None:
    """Rounding is the same, but a value whose last bits differ may be rounded to its other neighbour: so logits are
    compared, and only as far as the tokens agree."""
    model = checkpoint(tmp_path, family, **NO_EXPERTS[family])
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=131)
    prompts = [prompt(n, i) for i, n in enumerate((70, 3, 41, 16, 100))]
    requests = [Request(str(i), tuple(ids), len(ids), sampling) for i, ids in enumerate(prompts)]
    options = dict(max_num_batched_tokens=33, block_size=16, kv_cache_dtype="fp8", dtype="float32")
    on_cpu = {(t.request_id, t.offset): t for t in run(model, requests, **options).tokens}
    on_cuda = {(t.request_id, t.offset): t for t in run(model, requests, device="cuda", **options).tokens}
    compared = 0
    for request in requests:
        for offset in range(16):
            one, other = on_cpu[request.id, offset], on_cuda[request.id, offset]
            ours, theirs = ({t.token_id: t.logprob for t in x.logprob.top} for x in (one, other))
            spread = max(ours.values()) - min(ours.values())
            assert max(abs(ours[token] - theirs[token]) for token in ours) <= 0.02 * spread
            compared += 1
            if one.token_id != other.token_id:
                break
    assert compared >= 60


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_disaggregated_equals_colocated_across_devices(tmp_path: Path, kv_cache_dtype: str) -> None:
    model = checkpoint(tmp_path, "llama")
    requests = [sampled(f"n{n}", prompt(n, n), num_sequences=2) for n in (31, 64, 100)]
    options = dict(max_num_batched_tokens=40, block_size=16, kv_cache_dtype=kv_cache_dtype)
    colocated = run(model, requests, **options)
    la, lb = Listener(), Listener()
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


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pool_from_free_memory_and_half_precision(tmp_path: Path, dtype: str, kv_cache_dtype: str) -> None:
    model = checkpoint(tmp_path, "llama")
    listener, request = Listener(), greedy("x", prompt(40), 20)
    options = dict(num_blocks=None, block_size=None, gpu_memory_utilization=0.5, dtype=dtype)
    options["kv_cache_dtype"] = kv_cache_dtype
    with make_engine(model, listener, device="cuda", **options) as engine:
        assert engine.layout.block_size == 64
        total = torch.cuda.get_device_properties(0).total_memory
        assert 0.3 * total < engine.slab.numel() < 0.5 * total
        engine.submit(request)
        listener.wait(request)
        assert_idle(engine)


def test_a_step_without_memory_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator itself refuses: an MLP of 16384 floats for 6000 tokens, and 48 MiB to put it."""
    model = checkpoint(tmp_path, "llama", intermediate_size=16384, max_position_embeddings=8192)
    request = greedy("long", prompt(6000), 8)
    options = dict(device="cuda", num_blocks=200, block_size=64, max_num_batched_tokens=8192)
    expected = run(model, [request], **options).outputs
    own, cut = Runner.compute_in_parts, []

    def counted(self, *args):
        cut.append(args)
        return own(self, *args)

    monkeypatch.setattr(Runner, "compute_in_parts", counted)
    listener = Listener()
    with make_engine(model, listener, **options) as engine:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (48 << 20)) / total)
        try:
            engine.submit(request)
            listener.wait(request)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert_idle(engine)
    assert listener.outputs == expected and cut


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_bfloat16_logits_keep_to_float32(family: str, tmp_path: Path) -> None:
    """Whole model, chunks and single tokens: no further from float32 than the model's own bfloat16 is."""
    wide = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, head_dim=64, num_hidden_layers=8)
    path = checkpoint(tmp_path, family, **{**FAMILIES[family], **wide})
    device = torch.device("cuda")
    model = load(EngineConfig(str(path), dtype="bfloat16"), device)
    assert fuse_model(model, device, 64, 8).whole
    proof = _Proof(model, device, 64, 8)
    cache = proof._cache("bfloat16")
    with torch.inference_mode():
        ours = torch.cat([model.raw_logits(proof._batch(cache, *part)) for part in proof.parts]).float().cpu()
        ids = torch.tensor([proof._batch(cache, 0, 1).rows[0].sequence.token_ids])
        rows = [stop - 1 for _, stop in proof.parts]
        exact, own = (
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")(ids).logits[0, rows]
            for dtype in (torch.float32, torch.bfloat16)
        )
    error, expected = (((x.float() - exact).norm() / exact.norm()).item() for x in (ours, own))
    assert error <= 1.5 * expected + 2e-3 and error < 0.25
