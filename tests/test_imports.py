"""A start imports what a text model needs; what is left out is there again for whoever asks later."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from engine.imports import no_collections

# As if these were installed, and broke whoever imports them.
LEFT_OUT = ("librosa", "scipy", "sklearn", "soundfile", "torchaudio", "torchvision")

CODE = """
import gc, sys
from engine.imports import import_transformers, text_only
assert "torch" not in sys.modules and "transformers" not in sys.modules
with text_only():
    from transformers.utils.import_utils import is_torchvision_v2_available
    assert not is_torchvision_v2_available()
assert is_torchvision_v2_available()
import_transformers()
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers import utils
from transformers.loss import loss_for_object_detection as loss
assert gc.isenabled()
print(sorted(name for name in {left_out} if name in sys.modules), LlamaForCausalLM.__name__)
print(utils.is_scipy_available(), loss.is_scipy_available(), utils.is_sklearn_available())
"""


def test_transformers_without_what_a_text_model_does_not_need(tmp_path: Path) -> None:
    for name in LEFT_OUT:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError(__name__ + ' is imported')")
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").touch()
    (tmp_path / "PIL" / "Image.py").write_text("class Image: pass")
    root = Path(__file__).parents[1]
    paths = f"import sys; sys.path[:0] = [{str(root)!r}, {str(tmp_path)!r}]\n"
    code = paths + CODE.replace("{left_out}", str(LEFT_OUT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[] LlamaForCausalLM", "True True True"]


def test_no_collections() -> None:
    def num() -> int:
        return sum(generation["collections"] for generation in gc.get_stats())

    with pytest.raises(KeyError), no_collections():
        before = num()
        with no_collections():
            cycles: list = []
            for _ in range(20_000):
                cycles.append([cycles])
        assert num() == before and not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    with no_collections():
        kept = [[i] for i in range(20_000)]
    young = sum(len(gc.get_objects(generation)) for generation in (0, 1))
    assert young < len(kept), "the next collections would walk them"
