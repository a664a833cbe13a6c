"""Proof at load that a model computes through our attention, and computes what its own would.

Some architectures ignore the attention interface and would silently attend to nothing but their own chunk. So one dummy
step records every call, and for models small enough a short sequence in chunks is compared with the eager model.
"""

from itertools import pairwise
from typing import Any

import torch

from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.kv_layout import KVLayout, LayerShape
from engine.request import Request, SamplingParams
from engine.sequence import Row, Sequence

VERIFY_BELOW = 30_000_000  # parameters: above it the comparison is skipped unless asked for
TOLERANCE = 2e-3  # of the largest logit, in float32


class UnsupportedModel(Exception):
    """We cannot compute this model, or not rightly; the message says why."""


def probe(model: Any, device: torch.device) -> list[LayerShape]:
    """A dummy step of two tokens. Returns what each layer caches; raises UnsupportedModel."""
    name, num_layers = model.info.architectures[0], model.info.num_layers
    recorder = _Recorder(device)
    try:
        with torch.inference_mode():
            model.logits(recorder)
    except UnsupportedModel:
        raise
    except Exception as error:  # third-party model code: whatever it raises, it does not run with us
        raise UnsupportedModel(f"{name}: a dummy step failed: {type(error).__name__}: {error}") from error
    called = [layer for layer, _ in recorder.calls]
    if called != list(range(num_layers)):
        missing = sorted(set(range(num_layers)) - set(called))
        what = (
            f"layers {missing[:8]} of {num_layers} did not use it" if missing else f"it was called as {called[:8]}..."
        )
        raise UnsupportedModel(f"{name}: the attention interface is not followed: {what}")
    return [shape for _, shape in recorder.calls]


def compare(model: Any, device: torch.device) -> None:
    """Chunks and single tokens over a paged cache against one eager pass. Raises UnsupportedModel when they differ."""
    name, vocab_size = model.info.architectures[0], model.info.vocab_size
    windows = [layer.window for layer in model.layers if layer.window]
    length = min(model.info.max_model_len - 1, max(24, min([w for w in windows if w < 160], default=0) + 13))
    ids = torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    layout = KVLayout.of("verify", "", "", model.info.dtype, 16, model.layers)
    num_blocks = -(-length // 16)
    cache = KVCache(layout, num_blocks, device)
    sequence = dummy_sequence(ids, list(reversed(range(num_blocks))))
    cuts = sorted({0, length // 2, length - 2, length - 1, length})
    rows = [Row(sequence, a, b - a) for a, b in pairwise(cuts)]
    with torch.inference_mode():
        ours = torch.cat([model.logits(Batch([row], cache)) for row in rows])
        model.module.set_attn_implementation("eager")
        try:
            own = model.module(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()
        finally:
            model.module.set_attn_implementation("pdserve")
    own = own[[row.stop - 1 for row in rows]]
    error, scale = (ours - own).abs().max().item(), own.abs().max().item()
    if not error <= TOLERANCE * max(scale, 1e-3):
        raise UnsupportedModel(
            f"{name}: our attention gives other logits than the model's own (by {error:.2g}, largest {scale:.2g})"
        )


class _Recorder(Batch):
    """Stands in for the batch of a dummy step: notes each attention call and lends it a cache of its own shape."""

    def __init__(self, device: torch.device):
        self.calls: list[tuple[int, LayerShape]] = []
        self._device = device
        super().__init__([dummy_row(2, 1)], _Lender(device))  # type: ignore[arg-type]

    def record(self, module, query, key, value, window, other) -> None:
        if other.get("position_bias") is not None:
            raise UnsupportedModel(f"{type(module).__name__}: attention with a position bias is not supported")
        if not getattr(module, "is_causal", True):
            raise UnsupportedModel(f"{type(module).__name__}: attention is not causal")
        layer = module.layer_idx
        shape = LayerShape(key.shape[1], key.shape[3], value.shape[3], window or 0)
        self.calls.append((layer, shape))
        layout = KVLayout.of("probe", "", "", str(key.dtype).removeprefix("torch."), 16, [shape])
        self.cache.layers[layer] = KVCache(layout, 1, self._device).layers[0]


class _Lender:
    def __init__(self, device: torch.device):
        self.layout = KVLayout("probe", "", "", "float32", "float32", 16, ())
        self.is_scaled = False
        self.slab = torch.empty(0, dtype=torch.uint8, device=device)
        self.layers: dict = {}


def dummy_row(num_tokens: int, num_blocks: int) -> Row:
    """A row that stands for nobody's prompt, over blocks 0.. of a cache of its own."""
    return Row(dummy_sequence([0] * num_tokens, list(range(num_blocks))), 0, num_tokens)


def dummy_sequence(ids: list[int], block_ids: list[int]) -> Sequence:
    request = Request("verify", tuple(ids), len(ids), SamplingParams(temperature=0))
    return Sequence(request, 0, ids, 0, block_ids=block_ids)
