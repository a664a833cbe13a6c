"""What the router knows of the served model from its directory: sizes, end tokens, sampling defaults.

Workers may serve a shorter context than the checkpoint allows (their KV pool bounds it); the pool of workers lowers
`max_model_len` for the validator, this file only says what the checkpoint says.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protos import inference_pb2 as pb

MAX_CONTEXT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Model:
    """The checkpoint as far as a router needs it. `defaults` has every field but seed and logit_bias set."""

    name: str
    root: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    architectures: tuple[str, ...]
    dtype: str
    defaults: pb.SamplingParams


def load_model(name: str, directory: Path) -> Model:
    """Reads config.json and generation_config.json. ValueError if config.json is missing or has no vocab_size."""
    config = _read(directory / "config.json")
    if not config:
        raise ValueError(f"model directory {str(directory)!r} has no readable config.json")
    text = config.get("text_config") or config
    generation = _read(directory / "generation_config.json")
    vocab_size = text.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"config.json of {str(directory)!r}: vocab_size is {vocab_size!r}; it must be at least 1")
    eos = generation.get("eos_token_id", text.get("eos_token_id", config.get("eos_token_id")))
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    length = text.get("max_position_embeddings") or text.get("n_positions") or MAX_CONTEXT
    return Model(
        name=name,
        root=str(directory),
        vocab_size=vocab_size,
        max_model_len=int(length),
        eos_token_ids=tuple(int(i) for i in eos_ids),
        architectures=tuple(config.get("architectures") or ()),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
        defaults=_defaults(generation),
    )


def _defaults(generation: dict[str, Any]) -> pb.SamplingParams:
    """generation_config.json's sampling fields where given and in range, neutral values elsewhere.

    An explicit `do_sample: false` means greedy; its mere absence does not, as elsewhere in serving.
    """
    sampled = generation.get("do_sample") is not False
    return pb.SamplingParams(
        temperature=_number(generation, "temperature", 1.0, 0, 2) if sampled else 0.0,
        top_p=_number(generation, "top_p", 1.0, 1e-6, 1),
        top_k=int(_number(generation, "top_k", 0, 0, 2**31 - 1)),
        min_p=_number(generation, "min_p", 0.0, 0, 1),
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=_number(generation, "repetition_penalty", 1.0, 1e-3, 10),
        num_sequences=1,
    )


def _number(values: dict[str, Any], key: str, default: float, lowest: float, highest: float) -> float:
    value = values.get(key)
    if isinstance(value, int | float) and math.isfinite(value) and lowest <= value <= highest:
        return float(value)
    return default


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
