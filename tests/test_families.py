"""Model families: batched, chunked, across blocks and windows, token for token what transformers says. And refusals."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from engine.config import EngineConfig
from engine.model import load
from engine.verify import UnsupportedModel
from tests.engines import TINY, checkpoint, greedy, reference, run

MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": MOE,
    "mistral": dict(sliding_window=24),
    "gemma2": dict(sliding_window=24, query_pre_attn_scalar=16),
    "gemma3_text": dict(sliding_window=24, query_pre_attn_scalar=16),
    "phi3": dict(head_dim=None),
    "gpt_oss": dict(sliding_window=24, num_local_experts=4, num_experts_per_tok=2),
    # K and V of different widths, so blocks are read by stride; and layers whose head dims differ
    "deepseek_v3": dict(
        num_key_value_heads=4,
        head_dim=8,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, family, **FAMILIES[family])
    generator = torch.Generator().manual_seed(7)
    lengths = (70, 3, 41, 16, 17, 55)
    prompts = [torch.randint(3, 131, (n,), generator=generator).tolist() for n in lengths]
    answers = reference(model, prompts, 30)
    requests = [greedy(str(i), prompt, 30) for i, prompt in enumerate(prompts)]
    found = run(model, requests, max_num_batched_tokens=33, max_num_seqs=5)
    assert [found.outputs[str(i), 0] for i in range(len(prompts))] == answers
    assert len({token for answer in answers for token in answer}) > 10, "the model says the same thing always"


def write_config(directory: Path, model_type: str, **config) -> Path:
    chosen = {k: v for k, v in {**TINY, **config}.items() if v is not None}
    AutoConfig.for_model(model_type, **chosen).save_pretrained(directory)
    return directory


def rope(**parameters) -> dict:
    return dict(rope_parameters=dict(rope_theta=10000.0, **parameters))


REFUSED = {
    "llama": (rope(rope_type="dynamic", factor=4.0), "dynamic"),
    "phi3": (
        dict(
            head_dim=None,
            original_max_position_embeddings=32,
            **rope(
                rope_type="longrope",
                short_factor=[1.0] * 8,
                long_factor=[2.0] * 8,
                original_max_position_embeddings=32,
            ),
        ),
        "longrope",
    ),
    "llama4_text": (dict(num_local_experts=4, attention_chunk_size=16, intermediate_size_mlp=96), "chunked"),
    "qwen3_next": (
        dict(
            **MOE,
            shared_expert_intermediate_size=32,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"] * 2,
        ),
        "linear_attention",
    ),
    "lfm2": (dict(layer_types=["conv", "full_attention"] * 2), "conv"),
    "jamba": (dict(), "jamba|Jamba"),
    "mamba": (dict(), "mamba|Mamba"),
    "mamba2": (dict(num_heads=8), "mamba|Mamba"),
    "t5": (dict(), "encoder-decoder"),
    "bloom": (dict(n_layer=4, n_head=4), "[Bb]loom"),
    "mpt": (dict(d_model=64, n_heads=4, n_layers=4), "[Mm][Pp][Tt]"),
    "gptj": (dict(n_embd=64, n_layer=4, n_head=4, rotary_dim=8), "(?i)gptj"),
    "codegen": (dict(n_embd=64, n_layer=4, n_head=4, rotary_dim=8), "(?i)codegen"),
    "falcon": (dict(head_dim=None, num_key_value_heads=None, alibi=False), "(?i)falcon"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str, tmp_path: Path) -> None:
    config, words = REFUSED[family]
    write_config(tmp_path, family, **config)
    limit = 512 if family == "phi3" else None
    with pytest.raises(UnsupportedModel, match=words):
        load(EngineConfig(str(tmp_path), load_format="dummy", max_model_len=limit), torch.device("cpu"))


def test_longrope_is_fine_below_its_original_length(tmp_path: Path) -> None:
    write_config(tmp_path, "phi3", **REFUSED["phi3"][0])
    model = load(EngineConfig(str(tmp_path), load_format="dummy"), torch.device("cpu"))
    assert model.info.max_model_len == 32


def test_dummy_weights_are_seeded(tmp_path: Path) -> None:
    write_config(tmp_path, "llama")
    config = EngineConfig(str(tmp_path), load_format="dummy")
    a, b = (load(config, torch.device("cpu")) for _ in range(2))
    pairs = zip(a.module.parameters(), b.module.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs) and a.weights_digest == b.weights_digest
    assert a.info.eos_token_ids == {2} and a.info.vocab_size == 131


def test_a_wrong_attention_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If our attention computed something else than the model's own, load would say so."""
    from transformers.models.llama import modeling_llama

    write_config(tmp_path, "llama")
    own = modeling_llama.eager_attention_forward
    monkeypatch.setattr(
        modeling_llama,
        "eager_attention_forward",
        lambda m, q, k, v, mask, **kw: own(m, q, k, v, mask, **kw | dict(scaling=9.0)),
    )
    with pytest.raises(UnsupportedModel, match="other logits"):
        load(EngineConfig(str(tmp_path), load_format="dummy"), torch.device("cpu"))


def test_missing_and_foreign_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: "):
        load(EngineConfig(str(tmp_path)), torch.device("cpu"))
    write_config(tmp_path, "llama")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        load(EngineConfig(str(tmp_path)), torch.device("cpu"))
    with pytest.raises(ValueError, match="max_model_len: 513"):
        load(EngineConfig(str(tmp_path), load_format="dummy", max_model_len=513), torch.device("cpu"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    with pytest.raises((UnsupportedModel, ValueError), match="no_such_model"):
        load(EngineConfig(str(tmp_path), load_format="dummy"), torch.device("cpu"))
