"""What goes wrong in an engine ends where it began: aborts, NaN, a lost step, bad input."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.request import Failed, Request, SamplingParams
from tests.engines import Listener, assert_idle, greedy, make_engine, prompt, run, sampled
from tests.handoff import Silent


def test_abort_in_every_phase(llama: Path) -> None:
    listener = Listener()
    with make_engine(llama, listener, num_blocks=24, max_num_batched_tokens=16, max_model_len=380) as engine:
        other = greedy("other", prompt(20), 150)
        engine.submit(other)
        # waiting for seats and blocks, in mid-prompt, decoding, forked
        for name, request in {
            "queued": greedy("queued", prompt(300), 50),
            "prompt": greedy("prompt", prompt(200), 50),
            "decode": greedy("decode", prompt(8), 300),
            "forks": sampled("forks", prompt(9), max_tokens=100, num_sequences=3),
        }.items():
            engine.submit(request)
            if name == "prompt":
                listener.until(lambda: "prompt" in listener.started)
            elif name != "queued":
                listener.until(lambda key=(name, 0): len(listener.outputs.get(key, ())) > 3)
            engine.abort(name)
            engine.abort(name)
            engine.check().result(10)
            seen = len(listener.tokens)
            engine.check().result(10)
            assert not [t for t in listener.tokens[seen:] if t.request_id == name]
        # a sink prompt: not yet granted, granted, pinned
        for name, kind in (("asked", "grant"), ("pinned", "")):
            sink = Silent(engine, kind)
            engine.submit(greedy(name, prompt(40), 4), sink)
            assert sink.asked.wait(10)
            if name == "pinned":
                listener.until(lambda: ("pinned", 0) in listener.outputs)
            engine.abort(name)
        # reservations: held and queued
        engine.reserve("held", greedy("held", prompt(20), 4), 20).result(10)
        waiting = engine.reserve("waits", greedy("waits", prompt(300), 4), 330)
        engine.abort("held")
        engine.abort("waits")
        engine.check().result(10)
        assert waiting.cancelled()
        engine.abort("never heard of")
        listener.wait(other)
        assert_idle(engine)
    assert not listener.failed


def test_nan_in_one_request_stays_there(llama: Path, tmp_path: Path) -> None:
    """A token whose embedding is NaN poisons its own KV and logits; nobody else may notice, then or later."""
    from safetensors.torch import load_file, save_file

    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][77] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    clean = [greedy(str(i), [t for t in prompt(37, i) if t != 77], 30) for i in range(4)]
    clean = [replace(r, sampling=replace(r.sampling, logit_bias={77: -100.0})) for r in clean]
    expected = run(llama, clean).outputs
    listener = Listener()
    with make_engine(tmp_path, listener, num_blocks=14, max_num_batched_tokens=16) as engine:
        for i, request in enumerate(clean):
            engine.submit(request)
            engine.submit(greedy(f"bad{i}", [*prompt(20, i + 9), 77, *prompt(12, i)], 5))
        listener.wait(*clean)
        listener.until(lambda: len(listener.failed) == 4)
        assert {f.reason for f in listener.failed.values()} == {"NON_FINITE_LOGITS"}
        for request in clean:  # on blocks that held NaN a moment ago
            engine.submit(again := replace(request, id=f"again{request.id}"))
            listener.wait(again)
        assert_idle(engine)
    for request in clean:
        assert listener.outputs[request.id, 0] == listener.outputs[f"again{request.id}", 0] == expected[request.id, 0]


def test_a_lost_step_fails_its_requests_and_the_engine_goes_on(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    with make_engine(llama, listener) as engine:
        model = engine._runner.model
        own, bombs = type(model).logits, [True]

        def logits(self, batch):
            if bombs and any(row.sequence.request.id == "victim" for row in batch.rows):
                bombs.pop()
                raise RuntimeError("out of luck")
            return own(self, batch)

        monkeypatch.setattr(type(model), "logits", logits)
        engine.submit(greedy("victim", prompt(30), 4))
        listener.until(lambda: "victim" in listener.failed)
        assert listener.failed["victim"] == Failed("victim", "INTERNAL", "the step failed: RuntimeError: out of luck")
        engine.submit(after := greedy("victim", prompt(30), 4))
        listener.failed.clear()
        listener.wait(after)
        assert_idle(engine)


def test_bad_input_is_refused_at_once(pair) -> None:
    a, _, la, _ = pair
    with pytest.raises(ValueError, match="token_ids: 0 tokens"):
        a.submit(Request("e", (), 0, SamplingParams()))
    with pytest.raises(ValueError, match="131"):
        a.submit(greedy("e", [131]))
    with pytest.raises(ValueError, match="512 tokens is not in"):
        a.submit(greedy("e", [5] * 512))
    a.submit(twice := greedy("twice", prompt(9), 30))
    with pytest.raises(ValueError, match="twice"):
        a.submit(twice)
    la.wait(twice)
    assert_idle(a)
    with pytest.raises(ValueError, match="block_size: 20"):
        EngineConfig("x", block_size=20)
    with pytest.raises(ValueError, match="dtype: 'int8'"):
        EngineConfig("x", dtype="int8")
