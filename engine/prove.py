"""What fuse() needs to know and to prove: each layer's attention call, and fused layers against their originals."""

from typing import Any

import torch

from engine import ops
from engine.fuse import FuseReport, fuse
from engine.inputs import Inputs
from engine.kv_cache import KVCache
from engine.kv_layout import KVLayout
from engine.paged_attention import Call, Workspace
from engine.paged_batch import PagedBatch
from engine.sequence import Row
from engine.verify import _sequence

LENGTH = 40  # tokens of the proof: a chunk, then a chunk over a cached prefix, then single tokens
PARTS = ((0, 20), (20, 38), (38, 39), (39, 40))


def fuse_model(model: Any, device: torch.device) -> FuseReport:
    with torch.inference_mode():
        report = fuse(model, lambda: _record(model, device), lambda *args: _errors(model, device, *args))
        if model.fused is not None:
            report.whole = _same_logits(model, device)
            model.fused = model.fused if report.whole else None
        return report


def _same_logits(model: Any, device: torch.device) -> bool:
    """Whether going around the outer modules changes nothing: both ways run the same fused layers."""
    whole, answers = model.fused, []
    for model.fused in (None, whole):
        cache = KVCache(_layout(model, model.layers, model.info.dtype), 4, device)
        try:
            answers.append(model.raw_logits(_batch(cache, 0, LENGTH, model)).float())
        except (AttributeError, TypeError):  # other arguments than Llama's: a rotation per layer type, say
            return False
    return bool((answers[0] - answers[1]).abs().max() <= 1e-3 * answers[0].abs().max())


def _record(model: Any, device: torch.device) -> tuple[dict[int, Call], dict[int, dict]]:
    """One pass of the untouched model over a chunk: what each layer was given, and asked of attention."""
    calls: dict[int, Call] = {}
    inputs: dict[int, dict] = {}
    cache = KVCache(_layout(model, model.layers, model.info.dtype), 4, device)
    batch = _batch(cache, 0, LENGTH, model)
    own = batch.attend

    def attend(layer, query, key, value, scale, window, softcap, sinks):
        calls[layer] = Call(layer, float(scale), int(window), softcap, sinks)
        return own(layer, query, key, value, scale, window, softcap, sinks)

    batch.attend = attend  # type: ignore[method-assign]
    hooks = []
    for i, layer in enumerate(getattr(model.module.base_model, "layers", ())):

        def note(module, args, kwargs, i=i):
            inputs[i] = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "pdserve_batch")}

        hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    try:
        model.logits(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, inputs


def _errors(model: Any, device: torch.device, original, fused, real, call: Call, kwargs: dict) -> tuple[float, float]:
    """Of the float32 copy by definitions in torch, and of the layer as it will run; each the largest difference from
    the original in float32, relative to the largest change that the layer makes to its input.
    """
    own = getattr(torch, model.info.dtype)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, LENGTH, original.input_layernorm.weight.shape[0], generator=generator).to(device)
    answers = []
    for layer, dtype in ((original, torch.float32), (fused, torch.float32), (real, own)):
        cos, sin = (x.to(dtype) for x in kwargs["position_embeddings"])
        cache = KVCache(_layout(model, model.layers, str(dtype).removeprefix("torch.")), 4, device)
        parts = []
        ops.force_reference = layer is not real
        try:
            for start, stop in PARTS:
                angles = (cos[:, start:stop].contiguous(), sin[:, start:stop].contiguous())
                batch = _batch(cache, start, stop, model)
                given = dict(kwargs, position_embeddings=angles, position_ids=batch.positions)
                x = hidden[:, start:stop].to(dtype, copy=True)
                parts.append(layer(x, pdserve_batch=batch, **given).float())
        finally:
            ops.force_reference = False
        answers.append(torch.cat(parts, 1))
    change = (answers[0] - hidden).abs().max()
    return tuple(((answer - answers[0]).abs().max() / change).item() for answer in answers[1:])  # type: ignore


def _layout(model: Any, layers: list, dtype: str) -> KVLayout:
    return KVLayout.of("proof", "", "", dtype, 16, layers)


def _batch(cache: KVCache, start: int, stop: int, model: Any) -> PagedBatch:
    """One row of tokens [start, stop) over the cache's blocks in reverse."""
    device = cache.slab.device
    windows = [span.window for span in cache.layout.layers]
    workspace = Workspace(cache, 1, num_query_heads(model))
    inputs = Inputs(device, LENGTH, 1, cache.num_blocks, windows, workspace.tile, workspace.queries)
    ids = [(7 * i + 1) % model.info.vocab_size for i in range(LENGTH)]
    row = Row(_sequence(ids, list(reversed(range(cache.num_blocks)))), start, stop - start)
    num_chunks = int(row.num_tokens > 1)
    chunks = inputs.fill([row], row.num_tokens, 1, num_chunks, {}, 16)
    tensors = inputs.views(row.num_tokens, 1, num_chunks)
    return PagedBatch(
        tensors,
        tensors.ids.long()[None],
        tensors.positions.long()[None],
        tensors.last.long(),
        0 if chunks else 1,
        chunks,
        cache,
        workspace,
        [row],
    )


def num_query_heads(model: Any) -> int:
    """The most of any layer."""
    return int(model.module.config.get_text_config().num_attention_heads)
