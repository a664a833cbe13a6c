"""The device path (paged kernels, fused layers, steps launched ahead, graphs) gives what the reference path gives.

On CPU every kernel is its definition in torch, so this checks all but the kernels themselves; on a GPU it checks all.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.model import load
from engine.prove import fuse_model
from engine.request import FirstToken, Request, SamplingParams
from tests.engines import Listener, assert_idle, checkpoint, greedy, make_engine, prompt, run, sampled
from tests.test_families import FAMILIES

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] if CUDA else []


def paged(model: Path, requests: list[Request], **config) -> Listener:
    return run(model, requests, **{"device": DEVICE, "paged": True, "dtype": "float32", **config})


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_the_reference(family: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, family, **FAMILIES[family])
    requests = [greedy(str(i), prompt(n, i), 24) for i, n in enumerate((70, 3, 41, 16, 17, 55))]
    options = dict(max_num_batched_tokens=33, max_num_seqs=5)
    expected = run(model, requests, **options).outputs
    assert paged(model, requests, **options, block_size=16).outputs == expected
    if family == "llama":
        assert paged(model, requests, **options, block_size=64, fuse=False).outputs == expected
        assert paged(model, requests, **options, block_size=64, cuda_graphs=False).outputs == expected


KINDS = {
    "plain": dict(),
    "greedy": dict(temperature=0),
    "truncated": dict(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01),
    "penalised": dict(temperature=1.2, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
    "strict": dict(temperature=0, repetition_penalty=1.3, logprobs=2),
    "biased": dict(temperature=2.0, logit_bias={5: 4.0, 6: -50.0}, min_tokens=5, logprobs=3),
    "forked": dict(temperature=1.0, num_sequences=3, logprobs=0),
}


def test_every_kind_of_sampling_equals_the_reference(llama: Path) -> None:
    requests = [
        sampled(kind, prompt(20 + 3 * i, i), seed=i, **params) for i, (kind, params) in enumerate(KINDS.items())
    ]
    expected = run(llama, requests, max_num_batched_tokens=40, max_num_seqs=16)
    found = paged(llama, requests, max_num_batched_tokens=40, max_num_seqs=16)
    assert found.outputs == expected.outputs
    logprobs = {(t.request_id, t.sequence_index, t.offset): t.logprob for t in expected.tokens}
    for token in found.tokens:
        known = logprobs[token.request_id, token.sequence_index, token.offset]
        assert (known is None) == (token.logprob is None)
        if known is not None:
            assert token.logprob.rank == known.rank
            assert token.logprob.logprob == pytest.approx(known.logprob, abs=1e-4)
            assert [t.token_id for t in token.logprob.top] == [t.token_id for t in known.top]


def test_tiny_pool_preempts_and_everyone_finishes(llama: Path) -> None:
    requests = [greedy(str(i), prompt(20 + i, i), 60, priority=i % 2) for i in range(8)]
    requests += [sampled(f"n{i}", prompt(18, 90 + i), num_sequences=2, max_tokens=40) for i in range(2)]
    roomy = run(llama, requests)
    listener = Listener()
    options = dict(device=DEVICE, paged=True, dtype="float32", num_blocks=12, block_size=16)
    with make_engine(llama, listener, **options) as engine:
        for request in requests:
            engine.submit(request)
        listener.wait(*requests)
        assert engine.stats().preemptions > 0
        assert_idle(engine)
    assert listener.outputs == roomy.outputs


def test_eos_one_step_late_drops_the_extra_row(llama: Path, tmp_path: Path) -> None:
    free = run(llama, [replace(g := greedy("x", prompt(20), 30), sampling=replace(g.sampling, ignore_eos=True))])
    stop = free.outputs["x", 0][9]
    requests = [
        Request(str(i), tuple(prompt(20)), 20, SamplingParams(temperature=0, max_tokens=30, stop_token_ids={stop}))
        for i in range(3)
    ]
    expected = run(llama, requests)
    found = paged(llama, requests)
    assert found.outputs == expected.outputs and len(found.tokens) == len(expected.tokens)


class Sink:
    """Keeps what is reported, and grants itself pages at once."""

    receiver = "peer"

    def __init__(self, engine: Engine, request: Request):
        self.engine, self.request, self.calls = engine, request, []

    def wanted(self) -> None:
        self.engine.grant(self.request.id, 0)

    def sampled(self, token) -> None:
        pass

    def ready(self, block_ids, block_start, layer_start, layer_stop, after=None) -> None:
        self.calls.append((list(block_ids), block_start, layer_start, layer_stop))


def test_hand_off_from_device_to_device(llama: Path) -> None:
    request = greedy("h", prompt(75), 20)
    expected = run(llama, [request]).outputs["h", 0]
    options = dict(device=DEVICE, paged=True, dtype="float32", block_size=16, max_num_batched_tokens=33)
    first, second = Listener(), Listener()
    with make_engine(llama, first, **options) as a, make_engine(llama, second, **options) as b:
        sink = Sink(a, request)
        a.submit(request, sink)
        first.until(lambda: ("h", 0) in first.outputs)
        reservation = b.reserve("h", request, 75).result(10)
        seen = set()
        for block_ids, start, layer_start, layer_stop in sink.calls:
            for i, block_id in enumerate(block_ids):
                low, high = a.layout.layer_offsets[layer_start], a.layout.layer_offsets[layer_stop]
                b.slab[reservation.block_ids[start + i], low:high] = a.slab[block_id, low:high]
                seen |= {(start + i, layer) for layer in range(layer_start, layer_stop)}
        assert len(seen) == 5 * a.layout.num_layers
        token = first.outputs["h", 0][0]
        b.adopt("h", request, [FirstToken(token, False)]).result(10)
        second.until(lambda: ("h", 0) in second.finished)
        a.release("h")
        assert [token, *second.outputs["h", 0]] == expected
        assert_idle(a)
        assert_idle(b)


def test_a_bad_row_fails_alone(llama: Path) -> None:
    listener = Listener()
    with make_engine(llama, listener, device=DEVICE, paged=True, dtype="float32", cuda_graphs=False) as engine:
        own = engine._runner.model.raw_logits

        def spoiled(batch, out=None):
            logits = own(batch, out)
            for i, row in enumerate(batch.rows):
                if row.sequence.request.id == "bad" and row.start > 25:
                    logits[i, 7] = torch.nan
            return logits

        type(engine._runner.model).raw_logits, kept = staticmethod(spoiled), type(engine._runner.model).raw_logits
        try:
            requests = [greedy(name, prompt(20, i), 20) for i, name in enumerate(("a", "bad", "c"))]
            for request in requests:
                engine.submit(request)
            listener.until(lambda: {("a", 0), ("c", 0)} <= listener.finished and "bad" in listener.failed)
        finally:
            type(engine._runner.model).raw_logits = kept
        assert listener.failed["bad"].reason == "NON_FINITE_LOGITS"
        assert_idle(engine)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"])
def test_known_families_are_fused(family: str, tmp_path: Path) -> None:
    model = load(
        EngineConfig(str(checkpoint(tmp_path, family, **FAMILIES[family])), dtype="float32"),
        torch.device(DEVICE),
        verify=False,
    )
    report = fuse_model(model, torch.device(DEVICE))
    assert report.num_fused == report.num_layers and report.final_norm and not report.reasons
    assert report.whole == (family != "gemma3_text"), "its rotation differs by layer"


def test_a_changed_body_is_not_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models match Llama's rope text with another rotate_half: text alone proves nothing."""
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral

    path = checkpoint(tmp_path / "mistral", "mistral", **FAMILIES["mistral"])

    def rotate_half(x):
        x1 = x[..., : x.shape[-1] // 2]
        x2 = x[..., x.shape[-1] // 2 :]
        return torch.cat((x2, -x1), dim=-1)

    monkeypatch.setattr(modeling_mistral, "rotate_half", rotate_half)
    model = load(EngineConfig(str(path), dtype="float32"), torch.device(DEVICE), verify=False)
    report = fuse_model(model, torch.device(DEVICE))
    assert report.num_fused == 0 and "off by" in str(report)
    monkeypatch.undo()
    own = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: own(self, x) * 1.01)
    path = checkpoint(tmp_path / "llama", "llama")
    model = load(EngineConfig(str(path), dtype="float32"), torch.device(DEVICE), verify=False)
    report = fuse_model(model, torch.device(DEVICE))
    assert report.num_fused == 0 and "off by" in str(report)
