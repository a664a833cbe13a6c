"""One step on the device as the model sees it: what Batch is to the reference attention, for our kernels."""

from collections.abc import Callable, Sequence

import torch

from engine import ops
from engine.inputs import StepTensors
from engine.kv_cache import KVCache
from engine.paged_attention import Call, Chunk, Workspace, attend_chunk, attend_singles
from engine.sequence import Row


class PagedBatch:
    """`num_singles` rows of one token come first, then `chunks`. In a captured graph `rows` is empty."""

    def __init__(
        self,
        tensors: StepTensors,
        input_ids: torch.Tensor,  # int64 [1, num_tokens]
        positions: torch.Tensor,  # int64 [1, num_tokens]
        last: torch.Tensor,  # int64 [num_rows]
        num_singles: int,
        chunks: Sequence[Chunk],
        cache: KVCache,
        workspace: Workspace,
        rows: Sequence[Row] = (),
        on_layer: Callable[[int], None] = lambda layer: None,
    ):
        self.tensors, self.num_singles, self.chunks = tensors, num_singles, chunks
        self.is_decode = not chunks  # each token is its row's last
        self.input_ids, self.positions, self.last = input_ids, positions, last
        self.cache, self.workspace, self.rows, self.on_layer = cache, workspace, rows, on_layer

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # [1, num_heads, num_tokens, key_dim], as transformers hands it over
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """[1, num_tokens, num_heads, value_dim]."""
        q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        ops.write_kv(k, v, self.cache, layer, self.tensors.slots)
        return self.attend_written(q, k, v, Call(layer, scale, window, softcap, sinks))[None]

    def attend_written(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> torch.Tensor:
        """For K and V that are in the cache: all [num_tokens, heads, dim], the last dimension contiguous."""
        self.on_layer(call.layer)
        singles, space = self.tensors.singles, self.workspace
        if not self.chunks:
            return attend_singles(query, call, singles, self.cache, space)
        parts = []
        if self.num_singles:
            # the rows behind have no tiles, so the kernel needs not know of them
            parts.append(attend_singles(query[: self.num_singles], call, singles, self.cache, space))
        for chunk in self.chunks:
            here = slice(chunk.start, chunk.start + chunk.num_queries)
            parts.append(attend_chunk(query[here], key[here], value[here], call, chunk, self.cache))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
