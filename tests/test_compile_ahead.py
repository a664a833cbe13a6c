"""What is compiled ahead can be launched, for the shapes that configurations tell; and nothing there fails a start."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from engine import compile_ahead
from engine.config import EngineConfig
from engine.prove import num_query_heads
from tests.engines import TINY, checkpoint
from tests.test_families import FAMILIES
from tests.test_kernels import DEVICE, kernels  # noqa: F401


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_every_task_runs(family: str, tmp_path: Path) -> None:
    chosen = {**TINY, **FAMILIES[family]}
    AutoConfig.for_model(family, **chosen, dtype="float32").save_pretrained(tmp_path)
    config = EngineConfig(str(tmp_path), max_num_seqs=4)
    shape = compile_ahead._Shape.of(json.loads((tmp_path / "config.json").read_text()), config)
    assert (shape.num_heads, shape.num_kv_heads, shape.dim, shape.hidden) == (4, 2, 16, 64)
    assert set(shape.windows) == {"mistral": {24}, "gemma2": {24, 0}}.get(family, {0})
    assert shape.normed_heads == (family == "qwen3") and shape.is_gemma == (family == "gemma2")
    with torch.inference_mode():
        for task in compile_ahead._tasks(shape, config, DEVICE, 16):
            task()


def test_a_strange_configuration_is_left_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "odd"}')
    compile_ahead.compile_ahead(EngineConfig(str(tmp_path)), DEVICE, 16)()
    compile_ahead.compile_ahead(EngineConfig(str(tmp_path / "nowhere")), DEVICE, 16)()


def test_the_models_own_shape_is_guessed(tmp_path: Path) -> None:
    from engine.model import load

    path = checkpoint(tmp_path, "qwen3")
    config = EngineConfig(str(path), dtype="float32")
    model = load(config, torch.device("cpu"), verify=False)
    shape = compile_ahead._Shape.of(json.loads((path / "config.json").read_text()), config)
    layer = model.layers[0]
    assert (layer.num_kv_heads, layer.key_dim, layer.window) == (shape.num_kv_heads, shape.dim, shape.windows[0])
    assert num_query_heads(model) == shape.num_heads and model.info.vocab_size == shape.vocab_size
