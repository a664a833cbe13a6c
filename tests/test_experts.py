"""Every expert over every token gives what transformers' own routing gives: what a captured graph runs in float32."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import experts
from tests.engines import checkpoint
from tests.test_families import FAMILIES


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_every_expert_equals_the_models_own(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        assert experts.use_capturable_experts(model)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        found = model(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
