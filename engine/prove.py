"""What fuse() needs to know and to prove: each layer's attention call, and fused layers against their originals."""

from itertools import pairwise
from typing import Any

import torch

from engine import ops
from engine.fuse import ROUNDED, FuseReport, fuse
from engine.inputs import Inputs
from engine.kv_cache import KVCache
from engine.kv_layout import KVLayout
from engine.paged_attention import Call, Workspace
from engine.paged_batch import PagedBatch
from engine.rope_table import RopeTable
from engine.sequence import Row
from engine.verify import dummy_sequence

NUM_BLOCKS = 4


def fuse_model(model: Any, device: torch.device, block_size: int = 16, max_rows: int = 1) -> FuseReport:
    """Block size and rows as the steps will have them: other kernels would have to be compiled for others."""
    with torch.inference_mode():
        proof = _Proof(model, device, block_size, max_rows)
        report = fuse(model, proof.record, proof.errors)
        if model.fused is not None:
            report.whole = proof.same_logits()
            model.fused = model.fused if report.whole else None
        if model.fused is not None:
            like = model.fused.layers[0].pre_attention.weight
            model.fused.rotary = RopeTable.of(model.fused.rotary, model.info.max_model_len, like) or model.fused.rotary
        return report


class _Proof:
    def __init__(self, model: Any, device: torch.device, block_size: int, max_rows: int):
        self.model, self.device, self.block_size, self.max_rows = model, device, block_size, max_rows
        # a chunk, then a chunk over a cached prefix, then single tokens; blocks are crossed on the way
        cuts = (0, block_size + 4, 2 * block_size + 6, 2 * block_size + 7, 2 * block_size + 8)
        self.parts, self.length = list(pairwise(cuts)), cuts[-1]

    def same_logits(self) -> bool:
        """Whether going around the outer modules changes nothing: both ways run the same fused layers, but the last
        one's attention, which the shorter way computes for one row only.
        """
        model, answers = self.model, []
        whole = model.fused
        for model.fused in (None, whole):
            batch = self._batch(self._cache(model.info.dtype), 0, self.length)
            try:
                answers.append(model.raw_logits(batch).float())
            except (AttributeError, TypeError):  # other arguments than Llama's: a rotation per layer type, say
                return False
        tolerance = ROUNDED[getattr(torch, model.info.dtype)]
        return bool((answers[0] - answers[1]).abs().max() <= tolerance * answers[0].abs().max())

    def record(self) -> tuple[dict[int, Call], dict[int, dict]]:
        """One pass of the untouched model over a chunk: what each layer was given, and asked of attention."""
        calls: dict[int, Call] = {}
        inputs: dict[int, dict] = {}
        batch = self._batch(self._cache(self.model.info.dtype), 0, self.length)
        own = batch.attend

        def attend(layer, query, key, value, scale, window, softcap, sinks):
            calls[layer] = Call(layer, float(scale), int(window), softcap, sinks)
            return own(layer, query, key, value, scale, window, softcap, sinks)

        batch.attend = attend  # type: ignore[method-assign]
        hooks = []
        for i, layer in enumerate(getattr(self.model.module.base_model, "layers", ())):

            def note(module, args, kwargs, i=i):
                inputs[i] = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "pdserve_batch")}

            hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))
        ops.force_reference = True  # the answer does not matter, and a kernel for this alone would have to be compiled
        try:
            self.model.logits(batch)
        finally:
            ops.force_reference = False
            for hook in hooks:
                hook.remove()
        return calls, inputs

    def errors(self, original, fused, real, call: Call, kwargs: dict) -> tuple[float, float]:
        """Of the float32 copy by definitions in torch, and of the layer as it will run; each the largest difference
        from the original in float32, relative to the largest change that the layer makes to its input.
        """
        own = getattr(torch, self.model.info.dtype)
        generator = torch.Generator().manual_seed(0)
        width = original.input_layernorm.weight.shape[0]
        hidden = torch.randn(1, self.length, width, generator=generator).to(self.device)
        answers = []
        for layer, dtype in ((original, torch.float32), (fused, torch.float32), (real, own)):
            cos, sin = (x.to(dtype) for x in kwargs["position_embeddings"])
            cache = self._cache(str(dtype).removeprefix("torch."))
            parts = []
            ops.force_reference = layer is not real
            try:
                for start, stop in self.parts:
                    angles = (cos[:, start:stop].contiguous(), sin[:, start:stop].contiguous())
                    batch = self._batch(cache, start, stop)
                    given = dict(kwargs, position_embeddings=angles, position_ids=batch.positions)
                    x = hidden[:, start:stop].to(dtype, copy=True)
                    parts.append(layer(x, pdserve_batch=batch, **given).float())
            finally:
                ops.force_reference = False
            answers.append(torch.cat(parts, 1))
        change = (answers[0] - hidden).abs().max()
        return tuple(((answer - answers[0]).abs().max() / change).item() for answer in answers[1:])  # type: ignore

    def _cache(self, dtype: str) -> KVCache:
        layout = KVLayout.of("proof", "", "", dtype, self.block_size, self.model.layers)
        return KVCache(layout, NUM_BLOCKS, self.device)

    def _batch(self, cache: KVCache, start: int, stop: int) -> PagedBatch:
        """One row of tokens [start, stop) over the cache's blocks in reverse."""
        windows = [span.window for span in cache.layout.layers]
        space = Workspace(cache, self.max_rows, num_query_heads(self.model))
        inputs = Inputs(self.device, self.length, 1, NUM_BLOCKS, windows, space.tile, space.queries)
        ids = [(7 * i + 1) % self.model.info.vocab_size for i in range(self.length)]
        row = Row(dummy_sequence(ids, list(reversed(range(NUM_BLOCKS)))), start, stop - start)
        num_chunks = int(row.num_tokens > 1)
        chunks = inputs.fill([row], row.num_tokens, 1, num_chunks, {}, self.block_size)
        tensors = inputs.views(row.num_tokens, 1, num_chunks)
        return PagedBatch(
            tensors,
            tensors.ids.long()[None],
            tensors.positions.long()[None],
            tensors.last.long(),
            0 if chunks else 1,
            chunks,
            cache,
            space,
            [row],
        )


def num_query_heads(model: Any) -> int:
    """The most of any layer."""
    return int(model.module.config.get_text_config().num_attention_heads)
