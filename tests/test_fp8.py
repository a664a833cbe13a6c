"""KV kept in float8: rounded once where it is written, the same on every path, half the bytes, near the full answer."""

import json
from pathlib import Path

import pytest
import torch

from engine import fp8
from engine.config import EngineConfig
from engine.kv_cache import KVCache, Slots, Table
from engine.kv_layout import FP8, KVLayout, LayerShape
from engine.request import Request, SamplingParams
from tests.engines import Listener, assert_idle, checkpoint, greedy, make_engine, prompt, run, sampled
from tests.handoff import Handoff
from tests.references import FILE
from tests.service import request, service
from tests.test_families import FAMILIES

OPTIONS = dict(kv_cache_dtype="fp8", block_size=16)


# ---------------------------------------------------------------- the numbers


def test_rounding_is_at_most_a_sixteenth() -> None:
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 2000)[:, None]
    values, scale = fp8.quantise(x)
    largest = values.float().abs().amax(-1)
    assert largest.min() >= 224 and largest.max() <= 448
    back = fp8.dequantise(values, scale, torch.float32)
    near = x.abs() > x.abs().amax(-1, keepdim=True) / 2**14
    assert ((back - x).abs() <= x.abs() / 16)[near].all() and near.float().mean() > 0.99
    assert torch.equal(fp8.round_trip(back), back), "what was rounded once is not rounded again"
    for dtype in (torch.bfloat16, torch.float16):
        some = x[900:1100].to(dtype)
        assert torch.equal(fp8.round_trip(some).float(), fp8.round_trip(some.float())), "a half holds it exactly"


def test_no_row_changes_another_and_nothing_bad_is_hidden() -> None:
    x = torch.ones(4, 8)
    x[1, 3], x[2, 5], x[3] = torch.nan, torch.inf, 0.0
    back = fp8.round_trip(x)
    assert torch.equal(back[0], x[0]) and torch.equal(back[3], x[3])
    assert back[1].isnan().any() and not back[2].isfinite().all()
    edges = torch.tensor([[448.0], [449.0], [1.75], [1.7501], [3e38], [1e-36]])
    assert ((fp8.round_trip(edges) - edges).abs() <= edges / 16).all()


@pytest.mark.parametrize("dims", [(16, 16), (24, 16)])
def test_the_cache_gives_back_what_went_in_rounded(dims: tuple[int, int]) -> None:
    layout = KVLayout.of("m", "", "", "float32", 16, [LayerShape(2, *dims)] * 3, FP8)
    assert layout.block_bytes == 3 * 2 * 16 * (sum(dims) + 2)
    cache = KVCache(layout, 5, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    kept = []
    for layer in cache.layers:
        key, value = (torch.randn(40, 2, dim, generator=generator) for dim in dims)
        for here in (slice(0, 23), slice(23, 24), slice(24, 40)):
            at = torch.arange(40)[here]
            layer.write(key[here], value[here], Slots(torch.tensor([4, 1, 3])[at // 16], at % 16))
        kept.append((key, value))
    for layer, both in zip(cache.layers, kept, strict=True):
        for found, given in zip(layer.gather(Table(torch.tensor([[4, 1, 3]]))), both, strict=True):
            assert torch.equal(found[0, :, :40].transpose(0, 1), fp8.round_trip(given))
    assert not cache.slab[[0, 2]].any()
    cache.copy_block(4, 0)
    cache.zero_block(4)
    found = cache.layers[1].gather(Table(torch.tensor([[0]])))[0]
    assert torch.equal(found[0].transpose(0, 1), fp8.round_trip(kept[1][0][:16]))
    assert not cache.layers[1].gather(Table(torch.tensor([[4]])))[0].any()


# ---------------------------------------------------------------- the engine


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_same_tokens_in_any_company_and_on_every_path(family: str, tmp_path: Path) -> None:
    """In float32 what attention sees does not depend on chunks, cached prefixes or the batch, fp8 or not."""
    model = checkpoint(tmp_path, family, **FAMILIES[family])
    requests = [greedy(str(i), prompt(n, i), 24) for i, n in enumerate((70, 3, 41, 16, 17, 55))]
    requests.append(greedy("again", [*requests[0].token_ids, *prompt(9, 9)], 24))
    alone: dict = {}
    for one in requests:
        alone |= run(model, [one], **OPTIONS, max_num_batched_tokens=128).outputs
    together = run(model, requests, **OPTIONS, max_num_batched_tokens=33, max_num_seqs=5).outputs
    assert together == alone
    assert run(model, requests, **OPTIONS, max_num_batched_tokens=33, max_num_seqs=5, paged=True).outputs == alone
    assert run(model, requests, block_size=16).outputs != alone, "nothing was rounded"


def test_disaggregated_equals_colocated(llama: Path) -> None:
    requests = [sampled(f"n{n}", prompt(n, n), num_sequences=2) for n in (31, 64, 100)]
    colocated = run(llama, requests, **OPTIONS).outputs
    la, lb = Listener(), Listener()
    with make_engine(llama, la, **OPTIONS, paged=True) as a, make_engine(llama, lb, **OPTIONS) as b:
        assert a.layout.fingerprint == b.layout.fingerprint
        for one in requests:
            handoff = Handoff(a, b, la, one)
            handoff.start()
            first = handoff.finish()
            lb.wait(one)
            for key, tokens in first.items():
                assert tokens + lb.outputs[key] == colocated[key]
        assert_idle(a)
        assert_idle(b)


def test_layout_tells_fp8_from_the_rest(llama: Path) -> None:
    layouts = [make_engine(llama, Listener(), kv_cache_dtype=kind).layout for kind in ("auto", "fp8")]
    assert len({layout.fingerprint for layout in layouts}) == 2
    assert [layout.to_pb().kv_dtype for layout in layouts] == ["float32", "float8_e4m3fn"]
    assert layouts[0].block_bytes == 4 * 2 * 2 * 16 * 16 * 4 and layouts[1].block_bytes == 4 * 2 * 2 * 16 * 17
    with pytest.raises(ValueError, match="kv_cache_dtype: 'int4' is not one of auto, fp8"):
        EngineConfig("m", kv_cache_dtype="int4")


def test_real_model_stays_near_its_own_answers(smollm2: Path) -> None:
    """Each likely token's log-probability, one step behind prefixes of the unquantised model's own answers."""
    entries = json.loads(FILE.read_text())[:6]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=20)
    requests = []
    for i, entry in enumerate(entries):
        for cut in (0, 5, 11):
            ids = (*entry["prompt"], *entry["output"][:cut])
            requests.append(Request(f"{i}/{cut}", ids, len(ids), params))
    exact, rounded = (run(smollm2, requests, kv_cache_dtype=kind) for kind in ("auto", "fp8"))
    errors, same = [], 0
    for one, other in zip(*(sorted(x.tokens, key=lambda t: t.request_id) for x in (exact, rounded)), strict=True):
        assert one.logprob is not None and other.logprob is not None
        known = {t.token_id: t.logprob for t in other.logprob.top}
        errors += [abs(t.logprob - known[t.token_id]) for t in one.logprob.top[:5] if t.token_id in known]
        same += one.token_id == other.token_id
    assert len(errors) > 80 and sum(errors) / len(errors) < 0.2 and max(errors) < 0.8
    assert same >= 16, f"{same} of {len(requests)} tokens are the same"


# ---------------------------------------------------------------- the service


@pytest.mark.parametrize("block_size", [16, 32])
async def test_a_service_with_fp8_pools(smollm2: Path, block_size: int) -> None:
    """Over gRPC the pools agree with one engine, and move and keep little more than a quarter of float32's bytes; in
    blocks of another size too, for the scales are rows of a byte a token."""
    ids = json.loads(FILE.read_text())[0]["prompt"]
    alone = run(smollm2, [greedy("x", ids, 12)], **OPTIONS).outputs["x", 0]
    fp8_pools = dict(engine=dict(kv_cache_dtype="fp8"), decode_engine=dict(block_size=block_size))
    async with service(smollm2, **fp8_pools) as it:
        answer = await it.generate(request(ids, 12))
        layout = it.worker("prefill").engine.layout
        assert answer.token_ids == [alone]
        assert layout.block_bytes == 30 * 2 * 3 * 16 * (64 + 1)
        if block_size == 16:
            assert it.worker("decode").status()["kv_bytes_received"] == -(-len(ids) // 16) * layout.block_bytes
