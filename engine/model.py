"""Any decoder that transformers loads, computing through our attention, or an UnsupportedModel that says why not.

load(config) -> Model: refuse by config, load the weights, run a dummy step in which every layer must have called
our attention exactly once and in order, and, where it is cheap, compare with the model's own attention.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import attention
from engine.batch import Batch
from engine.config import EngineConfig
from engine.experts import use_capturable_experts
from engine.fuse import FusedModel
from engine.kv_layout import LayerShape
from engine.linear import use_onednn
from engine.paged_batch import PagedBatch
from engine.progress import making, reading
from engine.verify import VERIFY_BELOW, UnsupportedModel, compare, probe

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the outside may know of the model."""

    name: str
    path: str
    architectures: tuple[str, ...]
    dtype: str
    vocab_size: int
    num_layers: int
    num_parameters: int
    max_model_len: int
    eos_token_ids: frozenset[int]


@dataclass(slots=True)
class Model:
    info: ModelInfo
    module: torch.nn.Module
    layers: list[LayerShape]
    weights_digest: str
    rope_digest: str
    keeps_logits: bool  # whether forward() takes logits_to_keep
    fused: "FusedModel | None" = None  # set by fuse(), if it could rebuild everything

    def logits(self, batch: "Batch | PagedBatch") -> torch.Tensor:
        """float32 [num_rows, vocab_size]: of each row's last token."""
        return self.raw_logits(batch).float()

    def raw_logits(self, batch: "Batch | PagedBatch", out: torch.Tensor | None = None) -> torch.Tensor:
        """The same in the model's own dtype; in `out` if given."""
        if self.fused is not None and hasattr(batch, "tensors"):
            return self.fused(batch, out)
        every = getattr(batch, "is_decode", False)  # then each token is its row's last
        keep = {"logits_to_keep": batch.last} if self.keeps_logits and not every else {}
        logits = self.module(
            input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False, pdserve_batch=batch, **keep
        ).logits[0]
        logits = logits if self.keeps_logits or every else logits[batch.last]
        return logits if out is None else out.copy_(logits)


def load(
    config: EngineConfig,
    device: torch.device,
    verify: bool | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Model:
    """`verify` None: compare with the model's own attention if it has few parameters and is float32.

    Raises ValueError for a missing or unreadable directory, UnsupportedModel for a model we cannot compute rightly.
    """
    from transformers import AutoConfig

    path = Path(config.model)
    if not (path / "config.json").is_file():
        raise ValueError(f"model: {config.model!r} is not a directory with a config.json")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # else CUDA float32 is not CPU's
    if device.type == "cuda":
        # at 32 to 128 rows its choice for the widest product (14336 to 4096) takes 45 us, the default's 53
        torch.backends.cuda.preferred_blas_library("cublaslt")
    hf_config = AutoConfig.from_pretrained(path)
    text = hf_config.get_text_config()
    max_model_len = refuse_by_config(hf_config, config.max_model_len)
    dtype = _dtype(config.dtype, device, text)
    attention.register()
    try:
        module = _build(config, path, hf_config, dtype, device, progress)
        module.set_attn_implementation(attention.NAME)
        if device.type == "cuda":
            use_capturable_experts(module)
    except UnsupportedModel:
        raise
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"{hf_config.model_type}: transformers cannot build it for us: {error}") from error
    _check_dtypes(hf_config.model_type, module)
    num_parameters = sum(p.numel() for p in module.parameters())
    info = ModelInfo(
        name=config.served_model_name or path.name,
        path=str(path),
        architectures=tuple(hf_config.architectures or (type(module).__name__,)),
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=text.vocab_size,
        num_layers=text.num_hidden_layers,
        num_parameters=num_parameters,
        max_model_len=max_model_len,
        eos_token_ids=_eos_token_ids(path, text),
    )
    keeps_logits = "logits_to_keep" in inspect.signature(type(module).forward).parameters
    digest = _weights_digest(path, config.load_format, device)
    model = Model(info, module, [], digest, _rope_digest(text), keeps_logits)
    use_onednn(module)
    model.layers = probe(model, device)
    if verify or (verify is None and num_parameters <= VERIFY_BELOW and dtype == torch.float32):
        compare(model, device)
    return model


# ---------------------------------------------------------------- refusals


def refuse_by_config(hf_config: Any, max_model_len: int | None) -> int:
    """What the configuration alone tells. Returns the resolved max_model_len; raises UnsupportedModel or ValueError."""
    text = hf_config.get_text_config()
    name = hf_config.model_type
    if getattr(hf_config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name}: encoder-decoder models are not supported")
    known = {"full_attention", "sliding_attention"}
    strange = sorted(set(getattr(text, "layer_types", None) or ()) - known)
    if strange:
        raise UnsupportedModel(f"{name}: layers of type {', '.join(strange)} are not supported")
    if getattr(text, "attention_chunk_size", None) and name.startswith("llama4"):
        raise UnsupportedModel(f"{name}: chunked attention is not supported")
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2**20
    for rope in _ropes(text):
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "dynamic":
            raise UnsupportedModel(
                f"{name}: rope type 'dynamic' depends on the batch's longest sequence: not supported"
            )
        if kind == "longrope":
            original = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            original = int(original or limit)
            if max_model_len is not None and max_model_len > original:
                raise UnsupportedModel(
                    f"{name}: rope type 'longrope' changes its factors above {original} tokens: "
                    f"max_model_len {max_model_len} is not in [2, {original}]"
                )
            if max_model_len is None and original < limit:
                log.warning("%s: max_model_len lowered to %d, where longrope changes its factors", name, original)
            limit = min(limit, original)
    if max_model_len is not None and max_model_len > limit:
        raise ValueError(f"max_model_len: {max_model_len} is not in [2, {limit}], the model's own limit")
    return max_model_len or limit


def _ropes(text: Any) -> list[dict]:
    """The rope parameters, of which some models have one set per layer type."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


# ---------------------------------------------------------------- weights


def _build(
    config: EngineConfig,
    path: Path,
    hf_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str], None],
):
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_accelerate_available
    from transformers.utils import logging as hf_logging

    if config.load_format == "dummy":
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.device(device), making(progress):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(hf_config, dtype=dtype).eval()
    if not any(path.glob("*.safetensors")):
        raise UnsupportedModel(f"model: {config.model!r} has no *.safetensors (load_format 'dummy' needs none)")
    straight = {"device_map": {"": device}} if device.type != "cpu" and is_accelerate_available() else {}
    hf_logging.disable_progress_bar()
    try:
        with reading(progress, path):
            module = AutoModelForCausalLM.from_pretrained(
                path, config=hf_config, dtype=dtype, use_safetensors=True, trust_remote_code=False, **straight
            )
    finally:
        hf_logging.enable_progress_bar()
    return module.to(device).eval()


def _check_dtypes(name: str, module: torch.nn.Module) -> None:
    strange = {str(p.dtype).removeprefix("torch.") for p in module.parameters()} - {"float32", "bfloat16", "float16"}
    if strange:
        raise UnsupportedModel(
            f"{name}: weights of type {', '.join(sorted(strange))} are not supported; use a checkpoint in bfloat16, "
            "float16 or float32"
        )


def _dtype(name: str, device: torch.device, text: Any) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    own = getattr(text, "dtype", None)
    own = getattr(torch, own) if isinstance(own, str) else own
    return own if own in (torch.float32, torch.bfloat16, torch.float16) else torch.bfloat16


def _eos_token_ids(path: Path, text: Any) -> frozenset[int]:
    """Both places count: chat models often add their end-of-turn token in generation_config.json only."""
    ids: set[int] = set()
    generation = path / "generation_config.json"
    values = [getattr(text, "eos_token_id", None)]
    if generation.is_file():
        values.append(json.loads(generation.read_text()).get("eos_token_id"))
    for value in values:
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def _weights_digest(path: Path, load_format: str, device: torch.device) -> str:
    """SHA-256 over the checkpoint's headers and samples of every file, a fraction of a second at any size.

    Each safetensors file gives its size, its header (names, shapes, types) and 256 pages of 4 KiB spread over it.
    """
    digest = hashlib.sha256()
    if load_format == "dummy":  # drawn on the device, whose random numbers are not another kind's
        digest.update(f"dummy {device.type} ".encode() + (path / "config.json").read_bytes())
        return digest.hexdigest()
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(8 + int.from_bytes(stream.read(8), "little")))
            for i in range(256):
                stream.seek(size * i // 256)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def _rope_digest(text: Any) -> str:
    """SHA-256 over whatever of the configuration turns positions into angles."""
    words = ("rope", "rotary", "position", "alibi")
    chosen = {k: v for k, v in text.to_dict().items() if any(word in k for word in words)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()
