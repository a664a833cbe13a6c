"""Kernels compiled, and CUDA's libraries loaded, in threads of their own while the weights are still on their way.

Compilers and loaders spend most of their time outside Python's lock, but not all: beside the imports of transformers,
which hold it, only libraries are loaded; the kernels come after them. Each task launches one op on a few tokens, with
the widths that the checkpoint's config.json tells, so that the model's own launches find the same kernel ready; where
the guess is wrong, they compile theirs as they always would. Nothing here can fail a start.
"""

import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import ops
from engine.config import EngineConfig
from engine.device_sampler import Picker
from engine.imports import import_transformers
from engine.inputs import Inputs
from engine.kv_cache import KVCache
from engine.kv_layout import FP8, ITEM_BYTES, KVLayout, LayerShape
from engine.paged_attention import Call, Workspace, attend_chunks, attend_singles
from engine.sequence import Row
from engine.verify import dummy_sequence

log = logging.getLogger(__name__)

NUM_THREADS = 8


def compile_ahead(config: EngineConfig, device: torch.device, block_size: int) -> Callable[[], None]:
    """Starts; what it returns waits for the end."""
    try:
        shape = _Shape.of(json.loads((Path(config.model) / "config.json").read_text()), config)
    except Exception as error:  # whatever a stranger's configuration lacks, the model itself will tell
        log.debug("nothing compiled ahead: %s: %s", type(error).__name__, error)
        return lambda: None
    pool = ThreadPoolExecutor(NUM_THREADS, "compile")

    def run(task: Callable[[], object]) -> None:
        with torch.inference_mode(), torch.cuda.device(device):
            task()

    def lead() -> list[Future]:
        with torch.inference_mode(), torch.cuda.device(device):
            tasks = _tasks(shape, config, device, block_size)
        return [pool.submit(run, task) for task in tasks]

    libraries = pool.submit(run, _load_libraries(shape, device))
    import_transformers()
    leader = pool.submit(lead)

    def wait() -> None:
        futures: list[Future] = [libraries, leader]
        futures += [] if leader.exception() is not None else leader.result()
        for future in futures:
            error = future.exception()
            if error is not None:
                log.debug("a kernel was not compiled ahead: %s: %s", type(error).__name__, error)
        pool.shutdown()

    return wait


@dataclass(frozen=True, slots=True)
class _Shape:
    num_heads: int
    num_kv_heads: int
    dim: int
    hidden: int
    wide: int
    vocab_size: int
    windows: tuple[int, ...]  # one for each kind of layer
    softcap: float | None
    normed_heads: bool
    is_gemma: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, raw: dict[str, Any], config: EngineConfig) -> "_Shape":
        text = raw.get("text_config") or raw
        kind = text["model_type"]
        heads = text["num_attention_heads"]
        name = config.dtype
        if name == "auto":
            name = text.get("dtype") or text.get("torch_dtype") or "bfloat16"
        window = text.get("sliding_window") or 0
        if text.get("use_sliding_window") is False:
            window = 0
        is_gemma = kind.startswith("gemma")
        return cls(
            heads,
            text.get("num_key_value_heads") or heads,
            text.get("head_dim") or text["hidden_size"] // heads,
            text["hidden_size"],
            text["intermediate_size"],
            text["vocab_size"],
            (window, 0) if window and is_gemma else (window,),
            text.get("attn_logit_softcapping"),
            kind.startswith(("qwen3", "gemma3")),
            is_gemma,
            getattr(torch, name if name in ITEM_BYTES else "bfloat16"),
        )


def _load_libraries(shape: _Shape, device: torch.device) -> Callable[[], object]:
    def task() -> None:
        x = torch.zeros(512, shape.hidden, dtype=shape.dtype, device=device)
        torch.mm(x, x.t())
        if shape.dtype != torch.float32 and shape.dim <= 128 and torch.backends.cudnn.is_available():
            q = torch.zeros(1, 1, 512, shape.dim, dtype=shape.dtype, device=device)
            torch.ops.aten._scaled_dot_product_cudnn_attention(q, q, q, None, True, 0.0, True, False)

    return task


def _tasks(shape: _Shape, config: EngineConfig, device: torch.device, block_size: int) -> list[Callable[[], object]]:
    """The slowest to compile first."""
    num_tokens, heads, kv_heads, dim = 2 * block_size, shape.num_heads, shape.num_kv_heads, shape.dim
    max_rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    layers = [LayerShape(kv_heads, dim, dim, window) for window in shape.windows]
    kv_dtype = FP8 if config.kv_cache_dtype == "fp8" else None
    layout = KVLayout.of("ahead", "", "", str(shape.dtype).removeprefix("torch."), block_size, layers, kv_dtype)
    cache = KVCache(layout, 2, device)
    space = Workspace(cache, max_rows, heads)
    inputs = Inputs(device, num_tokens, 1, 2, shape.windows, space.tile, space.queries)
    row = Row(dummy_sequence([0] * num_tokens, [0, 1]), 0, num_tokens)
    chunks = inputs.fill([row], num_tokens, 1, 1, {}, block_size)
    tensors = inputs.views(num_tokens, 1, 1)
    qkv = torch.zeros(num_tokens, (heads + 2 * kv_heads) * dim, dtype=shape.dtype, device=device)
    query = qkv.view(num_tokens, -1, dim)[:, :heads]
    out = torch.empty(num_tokens, heads, dim, dtype=shape.dtype, device=device)
    angles = torch.zeros(num_tokens, dim, dtype=shape.dtype, device=device)
    offset = 1.0 if shape.is_gemma else 0.0
    norm = ops.Norm(torch.ones(shape.hidden, dtype=shape.dtype, device=device), 1e-6, offset)
    head_norm = ops.Norm(torch.ones(dim, dtype=shape.dtype, device=device), 1e-6, offset)
    x, residual = torch.zeros(2, num_tokens, shape.hidden, dtype=shape.dtype, device=device)
    gate_up = torch.zeros(num_tokens, 2 * shape.wide, dtype=shape.dtype, device=device)
    calls = [Call(i, 1.0, window, shape.softcap) for i, window in enumerate(shape.windows)]
    picker = Picker(max_rows, shape.vocab_size, device)
    logits = torch.zeros(1, shape.vocab_size, dtype=shape.dtype, device=device)
    both = torch.zeros(num_tokens, heads, dim, dtype=shape.dtype, device=device)
    lse = torch.zeros(heads, num_tokens, device=device)

    def norms() -> None:
        ops.add_norm(x, None, norm)
        if shape.is_gemma:
            ops.add_norm(x, residual, norm, norm)
        else:
            ops.add_norm(x, residual, norm)

    def attention(call: Call) -> None:
        attend_chunks(query, call, tensors, chunks, cache, space, out)

    def decode(call: Call) -> None:
        # no row has any KV, so nothing is read
        attend_singles(query[:1], call, tensors.singles, cache, space)

    norm_pair = (head_norm, head_norm) if shape.normed_heads else None
    return [
        *(lambda call=call: attention(call) for call in calls),  # type: ignore[misc]
        *(lambda call=call: decode(call) for call in calls),  # type: ignore[misc]
        lambda: ops.rope_write(qkv, angles, angles, norm_pair, cache, 0, tensors.slots),
        norms,
        lambda: ops.gated(gate_up, "gelu_tanh" if shape.is_gemma else "silu"),
        lambda: picker.pick(logits, tensors.keys, tensors.temperatures, picker.tokens[:1]),
        lambda: ops.prepare(tensors.ids, tensors.sources, tensors.positions, tensors.last, picker.tokens),
        lambda: ops.merge(out, lse, both, lse),
        lambda: ops.gather(tensors.singles.tables[:2], cache, 0),
    ]
