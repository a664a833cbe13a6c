"""Our attention, as transformers calls it. Registered as "pdserve" in transformers.AttentionInterface.

The name has no entry in transformers' mask table, so the models build no masks: each query's reach follows from the
batch, which also knows how to attend. `attend` is the reference in plain torch, for any device.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from engine import fp8

if TYPE_CHECKING:
    from engine.batch import Batch, Group
    from engine.paged_batch import PagedBatch

NAME = "pdserve"


def register() -> None:
    """Makes NAME known to transformers. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, key_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, key_dim]
    value: torch.Tensor,  # [1, num_kv_heads, num_tokens, value_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,  # attention sinks, [num_heads]
    pdserve_batch: "Batch | PagedBatch | None" = None,
    **other,
) -> tuple[torch.Tensor, None]:
    """Writes this step's K and V to the cache and attends. Returns [1, num_tokens, num_heads, value_dim]."""
    assert pdserve_batch is not None, "the model does not hand keyword arguments down to its attention"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    recorder = getattr(pdserve_batch, "record", None)
    if recorder is not None:
        recorder(module, query, key, value, sliding_window, other)
    layer: int = module.layer_idx  # type: ignore[assignment]
    return pdserve_batch.attend(layer, query, key, value, scale, sliding_window or 0, softcap, s_aux), None


def attend(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: "Batch",
    scale: float,
    window: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    cache = batch.cache.layers[layer]
    cache.write(key[0].transpose(0, 1), value[0].transpose(0, 1), batch.slots)
    batch.on_layer(layer)
    outputs = []
    for group in batch.groups:
        q = query[:, :, group.start : group.stop]
        if group.is_fresh and group.num_queries > 1:
            k, v = key[:, :, group.start : group.stop], value[:, :, group.start : group.stop]
            if batch.cache.is_scaled:  # else a prompt's tokens would depend on the chunks it came in
                k, v = fp8.round_trip(k), fp8.round_trip(v)
        else:
            k, v = cache.gather(group.table(batch.cache.layout.block_size))
            k, v = k[:, :, : group.max_kv_len], v[:, :, : group.max_kv_len]
        if group.num_queries == 1:
            outputs.append(_attend_single(q, k, v, group.mask(window, q.dtype), scale, softcap, sinks))
        else:
            outputs.append(_attend_chunk(q, k, v, group, window, scale, softcap, sinks))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _attend_single(q, k, v, mask, scale, softcap, sinks) -> torch.Tensor:
    """One query per row. q [1, num_heads, num_rows, dim]; the query heads of one kv head become its queries."""
    num_rows, num_kv_heads = k.shape[:2]
    q = q[0].transpose(0, 1).reshape(num_rows, num_kv_heads, -1, q.shape[-1])
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = plain_attention(q, k, v, mask, scale, softcap, None if sinks is None else sinks.view(num_kv_heads, -1, 1))
    return out.reshape(1, num_rows, -1, v.shape[-1])


def _attend_chunk(q, k, v, group: "Group", window, scale, softcap, sinks) -> torch.Tensor:
    """One row of many queries. q [1, num_heads, num_queries, dim]."""
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    if softcap is None and sinks is None:
        causal = group.is_fresh and not 0 < window < group.max_kv_len
        mask = None if causal else group.mask(window, q.dtype)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=num_heads != num_kv_heads
        )
        return out.transpose(1, 2)
    q = q.unflatten(1, (num_kv_heads, -1))
    sinks = None if sinks is None else sinks.view(num_kv_heads, -1, 1, 1)
    mask = group.mask(window, q.dtype)
    assert mask is not None, "several queries always need one"
    out = plain_attention(q, k[:, :, None], v[:, :, None], mask[:, None], scale, softcap, sinks)
    return out.flatten(1, 2).transpose(1, 2)


def plain_attention(q, k, v, mask, scale, softcap, sinks) -> torch.Tensor:
    """Attention spelled out, in float32: SDPA knows neither soft caps nor sinks."""
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:  # a sink is one more key that everyone may look at and that has no value
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights, v.float()).to(q.dtype)
