"""What a decoder layer does between its matrix products: Triton on CUDA, and for every op its definition in torch.

The kernels' modules are imported on first use, so nothing here needs Triton on a CPU.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.kv_cache import KVCache, Slots, Table

force_triton = False  # tests: run the kernels on CPU tensors, in Triton's interpreter
force_reference = False  # the definitions on CUDA too: what a fused layer is proven with


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: x / rms(x) * (weight + offset)."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        value = x.float()
        value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + self.eps)
        return (value * (self.weight.float() + self.offset)).to(x.dtype)


def add_norm(x: torch.Tensor, residual: torch.Tensor | None, norm: Norm, before: Norm | None = None) -> torch.Tensor:
    """norm(residual + before(x)), all [num_rows, width]; `residual` becomes that sum. Without it: norm(x)."""
    if not uses_triton(x):
        x = before.reference(x) if before is not None else x
        if residual is not None:
            x = residual.copy_(residual + x)
        return norm.reference(x)
    from engine.triton_layer import add_norm_kernel

    num_rows, width = x.shape
    out = torch.empty_like(x)
    block = power_of_two(width)
    add_norm_kernel[(num_rows,)](
        x,
        x if residual is None else residual,
        norm.weight if before is None else before.weight,
        norm.weight,
        out,
        width,
        norm.eps,
        OFFSET=norm.offset,
        ADD=residual is not None,
        BEFORE=before is not None,
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )
    return out


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up of [num_rows, 2 * width], in the place of gate. `activation`: silu, gelu_tanh or gelu."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if not uses_triton(gate_up):
        gate, up = gate_up.float().chunk(2, -1)
        kind = "tanh" if activation == "gelu_tanh" else "none"
        gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=kind)
        return gate_up[:, :width].copy_(gate * up)
    from engine.triton_layer import gated_kernel

    block = min(1024, power_of_two(width))
    grid = (num_rows, -(-width // block))
    gated_kernel[grid](gate_up, width, ACTIVATION=activation, BLOCK=block, num_warps=4)
    return gate_up[:, :width]


def rope_write(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * dim], q may lack; q and k are rotated in place
    cos: torch.Tensor,  # [num_tokens, dim]
    sin: torch.Tensor,
    norms: tuple[Norm, Norm] | None,  # on each head of q and of k, before the rotation
    cache: KVCache,
    layer: int,
    slots: torch.Tensor,  # int32 [num_tokens]; below zero: not cached
) -> None:
    """Normalises and rotates q and k, and writes k and v to the cache."""
    span = cache.spans[layer]
    dim, num_kv_heads = span.key_dim, span.num_kv_heads
    num_heads = qkv.shape[1] // dim - 2 * num_kv_heads
    if not uses_triton(qkv):
        q, k, v = qkv.view(qkv.shape[0], -1, dim).split([num_heads, num_kv_heads, num_kv_heads], 1)
        for part, norm in zip((q, k), norms or (None, None), strict=True):
            x = part if norm is None else norm.reference(part)
            low, high = x.float().chunk(2, -1)
            turned = torch.cat([-high, low], -1)
            part.copy_(x.float() * cos.float()[:, None] + turned * sin.float()[:, None])
        write_kv(k, v, cache, layer, slots)
        return
    from engine.triton_layer import rope_write_kernel

    heads = _common_power(num_heads or num_kv_heads, num_kv_heads, 8)
    norm = norms[0] if norms else None
    rope_write_kernel[(qkv.shape[0], (num_heads + 2 * num_kv_heads) // heads)](
        qkv,
        cos,
        sin,
        norm.weight if norm else cos,
        norms[1].weight if norms else cos,
        cache.elements,
        cache.slab,
        slots,
        span.first,
        span.scales,
        cache.elements.stride(0),
        norm.eps if norm else 0.0,
        num_heads,
        num_kv_heads,
        OFFSET=norm.offset if norm else 0.0,
        NORM=norm is not None,
        DIM=dim,
        HALF=power_of_two(dim // 2),
        HEADS=heads,
        BLOCK_SIZE=cache.layout.block_size,
        SCALED=cache.is_scaled,
        num_warps=2,
    )


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: KVCache, layer: int, slots: torch.Tensor) -> None:
    """key [num_tokens, num_kv_heads, key_dim], value likewise, of any strides but the last."""
    span, size = cache.spans[layer], cache.layout.block_size
    if not uses_triton(key):
        chosen = (slots >= 0).nonzero().flatten()
        picked = slots[chosen].long()
        cache.layers[layer].write(key[chosen], value[chosen], Slots(picked // size, picked % size))
        return
    from engine.triton_layer import write_kernel

    key = key if key.stride(2) == 1 else key.contiguous()
    value = value if value.stride(2) == 1 else value.contiguous()
    write_kernel[(key.shape[0], span.num_kv_heads)](
        key,
        value,
        cache.elements,
        cache.slab,
        slots,
        span.first,
        span.scales,
        cache.elements.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        span.num_kv_heads,
        KEY_DIM=span.key_dim,
        VALUE_DIM=span.value_dim,
        KEY_BLOCK=power_of_two(span.key_dim),
        VALUE_BLOCK=power_of_two(span.value_dim),
        BLOCK_SIZE=size,
        SCALED=cache.is_scaled,
        num_warps=1,
    )


def gather(table: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
    """A layer's K and V, of one width, in the blocks `table` (int32): [2 * num_kv_heads, tokens, dim]."""
    span, size = cache.spans[layer], cache.layout.block_size
    tile, num_tiles = size * span.key_dim, 2 * span.num_kv_heads
    if not uses_triton(cache.slab):
        return torch.cat(cache.layers[layer].gather(Table(table[None].long())), 1)[0]
    from engine.triton_layer import gather_kernel

    out = torch.empty(num_tiles, table.shape[0] * size, span.key_dim, dtype=cache.dtype, device=table.device)
    gather_kernel[(table.shape[0], num_tiles)](
        cache.elements,
        cache.slab,
        table,
        out,
        span.first,
        span.scales,
        cache.elements.stride(0),
        TILE=tile,
        DIM=span.key_dim,
        BLOCK=min(8192, power_of_two(tile)),
        SCALED=cache.is_scaled,
        num_warps=8,
    )
    return out


def prepare(
    ids: torch.Tensor, sources: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and last as int64; where a source is given, the id is that row's token of the step before.

    A row that was not finite left -1 there: its request has failed, but the step behind was launched already.
    """
    if not uses_triton(ids):
        late = tokens[sources.clamp(min=0).long()].clamp(min=0)
        return torch.where(sources >= 0, late, ids.long()), positions.long(), last.long()
    from engine.triton_layer import prepare_kernel

    num_tokens, num_rows = ids.shape[0], last.shape[0]
    size = num_tokens + num_tokens % 2  # all parts begin at 16 bytes, or another kernel would be compiled
    out = torch.empty(2 * size + num_rows, dtype=torch.int64, device=ids.device)
    outs = out[:num_tokens], out[size : size + num_tokens], out[2 * size :]
    grid = (-(-num_tokens // 256),)
    prepare_kernel[grid](ids, sources, positions, last, tokens, *outs, num_tokens, num_rows, BLOCK=256, num_warps=4)
    return outs


def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Attention to more keys, into `out`: all [num_rows, num_heads, dim], heads and dim contiguous; lse float32
    [num_heads, >= num_rows], the logarithm of each row's sum of weights."""
    num_rows, num_heads, dim = out.shape
    if not uses_triton(out):
        a, b = lse[:, :num_rows].T[..., None], other_lse[:, :num_rows].T[..., None]
        both = torch.logaddexp(a, b)
        out.copy_(out.float() * (a - both).exp() + other.float() * (b - both).exp())
        lse[:, :num_rows] = both[..., 0].T
        return
    from engine.triton_layer import merge_kernel

    heads = min(16, power_of_two(num_heads))
    merge_kernel[(num_rows, -(-num_heads // heads))](
        out,
        lse,
        other,
        other_lse,
        out.stride(0),
        other.stride(0),
        lse.stride(0),
        other_lse.stride(0),
        num_heads,
        DIM=dim,
        BLOCK=power_of_two(dim),
        HEADS=heads,
        num_warps=4,
    )


def uses_triton(tensor: torch.Tensor) -> bool:
    return (tensor.is_cuda or force_triton) and not force_reference


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _common_power(a: int, b: int, most: int) -> int:
    """The largest power of two that divides both, at most `most`."""
    return min(a & -a, b & -b, most)
