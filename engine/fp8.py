"""K and V as float8 e4m3 with a power-of-two scale for each token and kv head: one byte an element, one more a row.

    value = e4m3 * 2 ** (scale - 127)      scale: a uint8, such that the row's largest e4m3 is in (224, 448]

A row is quantised by itself, so tokens are appended without touching those before them. With a power of two nothing is
lost but the mantissa's bits: e4m3 keeps 3 of them, a rounding error of at most 1/16 of a value, over 2 ** 14 below the
row's largest. Elements turn back into bfloat16 and float32 exactly; so what attention sees is what the cache holds.
NaN stays NaN and Inf becomes one of the two, so a poisoned row is still found.
"""

import torch

DTYPE = torch.float8_e4m3fn
_INT = torch.int32


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., dim] -> e4m3 of the same shape, uint8 [...]."""
    x = x.float()
    scale = _scale(x.abs().amax(-1))
    return (x * _power(254 - scale)[..., None]).to(DTYPE), scale.to(torch.uint8)


def dequantise(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse, but for the rounding."""
    return (x.float() * _power(scale)[..., None]).to(dtype)


def round_trip(x: torch.Tensor) -> torch.Tensor:
    """What the cache would give back for `x`."""
    return dequantise(*quantise(x), x.dtype)


def _scale(largest: torch.Tensor) -> torch.Tensor:
    """int32: 2 ** (scale - 127) * 448 is the smallest such number that is not below `largest`."""
    bits = largest.contiguous().view(_INT)
    return ((bits + 0x1FFFFF >> 23) - 8).clamp_(1, 253)  # 448 is 1.75 * 2 ** 8: a mantissa above .75 takes one more


def _power(scale: torch.Tensor) -> torch.Tensor:
    return (scale.to(_INT) << 23).view(torch.float32)
