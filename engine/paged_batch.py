"""One step on the device as the model sees it: what Batch is to the reference attention, for our kernels."""

from collections.abc import Callable, Sequence

import torch

from engine import ops
from engine.inputs import StepTensors
from engine.kv_cache import KVCache
from engine.paged_attention import Call, Chunk, Workspace, attend_chunks, attend_singles
from engine.sequence import Row
from engine.torch_prefill import attend_run, cudnn_takes, equal_runs


class PagedBatch:
    """Rows of one token come first, then `chunks`. A captured graph knows neither `rows` nor `chunks`: they change."""

    def __init__(
        self,
        tensors: StepTensors,
        input_ids: torch.Tensor,  # [1, num_tokens], int64; or int32 for a fused model, as the next two
        positions: torch.Tensor,  # [1, num_tokens]
        last: torch.Tensor,  # [num_rows]
        num_singles: int,
        chunks: Sequence[Chunk],  # empty in a captured graph
        cache: KVCache,
        workspace: Workspace,
        rows: Sequence[Row] = (),
        on_layer: Callable[[int], None] = lambda layer: None,
    ):
        self.tensors, self.num_singles, self.chunks = tensors, num_singles, chunks
        self.is_decode = not tensors.has_chunks  # each token is its row's last
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

    def attend_last(self, query: torch.Tensor, call: Call) -> torch.Tensor:
        """For the last tokens of all rows, their KV in the cache: [num_rows, num_heads, dim]. The last layer's only."""
        self.on_layer(call.layer)
        return attend_singles(query, call, self.tensors.tails, self.cache, self.workspace)

    def attend_written(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> torch.Tensor:
        """For K and V that are in the cache: all [num_tokens, heads, dim], the last dimension contiguous."""
        self.on_layer(call.layer)
        tensors, cache, space = self.tensors, self.cache, self.workspace
        if self.is_decode:
            return attend_singles(query, call, tensors.singles, cache, space)
        by_cudnn = self.chunks and cudnn_takes(query, call, self.chunks, cache)
        runs = equal_runs(self.chunks) if by_cudnn else []
        if len(runs) == 1 and not self.num_singles:
            return attend_run(query, key, value, call, runs[0], cache)
        out = query.new_empty(*query.shape[:2], cache.spans[call.layer].value_dim)
        if self.num_singles:
            attend_singles(query, call, tensors.singles, cache, space, out)
        if not by_cudnn:
            attend_chunks(query, call, tensors, self.chunks, cache, space, out)
            return out
        for run in runs:
            here = slice(run[0].start, run[-1].start + run[-1].num_queries)
            out[here] = attend_run(query[here], key[here], value[here], call, run, cache)
        return out
