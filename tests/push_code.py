"""The PTX of what pushes and digests launch, as JSON by variant: `python -m tests.push_code`, apart from tests, whose
process has Triton's interpreter in place of its compiler. Launches are caught with all their arguments."""

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kv_transfer import push_kernel, round_kernel, triton_launch
from kv_transfer.push_kernel import Side
from kv_transfer.relayout import TileRange, Tiles, tile_ranges

TARGET = GPUTarget("cuda", 90, 32)
SLAB, PEER = 0x7F00_0000_0000, 0x7E00_0000_0000
BF16 = ((Tiles(8, 256), Tiles(8, 256)),) * 4
FLOAT8 = ((Tiles(8, 128), Tiles(8, 128), Tiles(16, 1)),) * 4
ODD = ((Tiles(3, 96), Tiles(3, 30)),) * 2  # heads of 48 and 15


def compiled(kernel: Any, numbers: tuple[int, ...], constants: dict[str, Any], num_warps: int) -> str:
    """The PTX of one launch."""
    named = dict(zip(kernel.arg_names, numbers, strict=False))
    assert [*named, *constants] == kernel.arg_names
    assert [*named] == [parameter.name for parameter in kernel.params if parameter.do_not_specialize]
    signature = {name: "i32" if -(2**31) <= value < 2**31 else "i64" for name, value in named.items()}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    return triton.compile(source, target=TARGET, options={"num_warps": num_warps}).asm["ptx"]


def width(layers: tuple[tuple[Tiles, ...], ...]) -> int:
    return sum(entry.num_tiles * entry.row_bytes for layer in layers for entry in layer)


def side(address: int, layers: tuple[tuple[Tiles, ...], ...], block_size: int) -> Side:
    return Side(address, width(layers) * block_size, block_size, address + 0x10_0000_0000, 0)


def main() -> None:
    launches: dict[str, tuple] = {}

    def catch(kernel, num_programs, numbers, constants, num_warps) -> None:
        widths = "".join("i"[: abs(number) >= 2**31] or "." for number in numbers)
        said = " ".join(f"{key}={value}" for key, value in constants.items())
        launches.setdefault(f"{kernel.__name__} {said} {widths}", (kernel, numbers, constants, num_warps))

    triton_launch.run = catch
    for layers in (BF16, FLOAT8, ODD):
        for here, there in ((64, 64), (16, 16), (64, 16)):
            sides = side(SLAB, layers, here), side(PEER, layers, there)
            for tiles in tile_ranges(layers, 1, 2):
                for guard in (0, SLAB) if here == there == 64 else (SLAB,):
                    push_kernel.launch(*sides, (0, 0), tiles, SLAB, 32, guard, 7)
                if here == there:
                    push_kernel.launch(sides[1], None, (0, 4 * here), tiles, SLAB, 64)
                    push_kernel.launch(sides[1], None, (16, 4 * here - 3), tiles, SLAB, 64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = tuple(tuple(Tiles(8, 128 * dtype.itemsize) for _ in range(2)) for _ in range(4))
        (source,), (values, scales) = tile_ranges(rows, 0, 4), tile_ranges(FLOAT8, 0, 4)
        for there in (64, 16):
            sides = side(SLAB, rows, 64), side(PEER, FLOAT8, there)
            round_kernel.launch(*sides, (0, 128), (source, values, scales), SLAB, 32, SLAB, 7, dtype=dtype)
    odd = TileRange(0, 6, 30, 0, 3, 6, 126), TileRange(0, 6, 15, 0, 3, 12, 96), TileRange(6, 6, 1, 90, 3, 12, 96)
    odd_sides = Side(SLAB + 2, 252 * 16, 16, SLAB, 0), Side(PEER + 2, 192 * 16, 16, SLAB, 0)
    round_kernel.launch(*odd_sides, (0, 32), odd, SLAB, 32, dtype=torch.bfloat16)
    print(json.dumps({name: compiled(*launch) for name, launch in launches.items()}))


if __name__ == "__main__":
    main()
