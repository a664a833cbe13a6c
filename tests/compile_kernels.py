"""Compiles every Triton kernel for a GPU that need not be there: `python -m tests.compile_kernels 90`, apart from the
tests' process, which has Triton's interpreter in the compiler's place. Prints a line each; ends with 1 if any fails,
takes more shared memory than there is, or has machine code that ptxas got wrong (tests/sass.py).

What a start would launch, for real widths and few tokens, is compiled instead of launched; so are the kernels of
rarer models, and those that move pages, whose addresses may then be anything.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from engine import compile_ahead, ops, paged_attention
from engine.config import EngineConfig
from engine.device import OLDEST_FP8
from engine.inputs import Inputs
from engine.kv_cache import KVCache
from engine.kv_layout import FP8, KVLayout, LayerShape
from engine.paged_attention import Call, Workspace, attend_chunks, attend_singles
from engine.sequence import Row
from engine.triton_sample import truncate_kernel
from engine.verify import dummy_sequence
from kv_transfer import push_kernel, round_kernel, triton_launch
from kv_transfer.push_kernel import Side
from kv_transfer.relayout import Tiles, tile_ranges
from tests.sass import unset_registers

SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448}  # that a block of threads can have, by capability
CPU = torch.device("cpu")
ADDRESS = 1 << 40

LLAMA = dict(
    model_type="llama",
    num_attention_heads=32,
    num_key_value_heads=8,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=4096,
)
SOFT = dict(head_dim=256, num_attention_heads=16, sliding_window=4096, attn_logit_softcapping=50.0)
STARTS = [
    (LLAMA, "bfloat16", "auto"),
    (LLAMA, "bfloat16", "fp8"),
    (LLAMA, "float32", "auto"),
    ({**LLAMA, "model_type": "qwen3", "head_dim": 128}, "float16", "fp8"),
    ({**LLAMA, "model_type": "gemma2", **SOFT}, "bfloat16", "auto"),
    ({**LLAMA, "model_type": "gemma2", **SOFT}, "bfloat16", "fp8"),
]

RARER = [
    ("sinks", 64, 8, 64, 64),
    ("wide K", 16, 16, 192, 128),
    ("narrow V", 4, 4, 24, 16),
    ("half as wide V", 8, 8, 64, 32),
    ("half as wide K", 8, 8, 32, 64),
]


def of_starts(has_fp8: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    for raw, dtype, kv_dtype in STARTS:
        if kv_dtype == "fp8" and not has_fp8:
            continue
        config = EngineConfig("m", dtype=dtype, kv_cache_dtype=kv_dtype, max_num_seqs=256, max_num_batched_tokens=8192)
        for task in compile_ahead._tasks(compile_ahead._Shape.of(raw, config), config, CPU, 64):
            yield f"{raw['model_type']} {dtype} {kv_dtype}", task


def of_rarer_models(has_fp8: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Attention with sinks, with K wider than V, and what writes their KV."""
    for kv_dtype in (None, FP8) if has_fp8 else (None,):
        for name, heads, kv_heads, key_dim, value_dim in RARER:
            layout = KVLayout.of("m", "", "", "bfloat16", 64, [LayerShape(kv_heads, key_dim, value_dim)], kv_dtype)
            cache = KVCache(layout, 2, CPU)
            space = Workspace(cache, 8, heads)
            inputs = Inputs(CPU, 128, 1, 2, [0], space.tile, space.queries)
            row = Row(dummy_sequence([0] * 128, [0, 1]), 0, 128)
            chunks = inputs.fill([row], 128, 1, 1, {}, 64)
            tensors = inputs.views(128, 1, 1)
            sinks = torch.zeros(heads) if name == "sinks" else None
            query = torch.zeros(128, heads, key_dim, dtype=torch.bfloat16)
            out = torch.zeros(128, heads, value_dim, dtype=torch.bfloat16)
            key, value = torch.zeros(128, kv_heads, key_dim + value_dim, dtype=torch.bfloat16).split(
                [key_dim, value_dim], 2
            )
            call = Call(0, 1.0, sinks=sinks)
            what = f"{name} {kv_dtype}"
            yield what, partial(attend_chunks, query, call, tensors, chunks, cache, space, out)
            yield what, partial(attend_singles, query[:1], call, tensors.singles, cache, space)
            yield what, partial(ops.write_kv, key, value, cache, 0, tensors.slots)
    scores, ints = torch.zeros(3, 128256), torch.zeros(3, dtype=torch.int32)
    floats = torch.zeros(3)
    yield "sampling", lambda: truncate_kernel[(3,)](scores, floats, ints, floats, 128256, BLOCK=4096, num_warps=16)


def of_transfers(has_fp8: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """From blocks of 64 tokens into others: of bfloat16, of float8 with scales, and rounded on the way."""
    layer = [Tiles(16, 256)]
    scaled = [Tiles(16, 128), Tiles(16, 1)]
    for source_layer, target_size in ((layer, 64), (layer, 16), (scaled, 64), (scaled, 16)):
        for tiles in tile_ranges([source_layer] * 32, 0, 32):
            source, target = _side(64, source_layer), _side(target_size, source_layer)
            ways = [("guarded", target, ADDRESS, True), ("digest alone", None, 0, True)]
            if source_layer is layer and target_size == 64:
                ways += [("unguarded", target, 0, True), ("without digest", target, ADDRESS, False)]
            for what, other, guard, with_digest in ways:
                yield (
                    f"rows of {tiles.row_bytes} into blocks of {target_size}, {what}",
                    partial(
                        push_kernel.launch,
                        *(source, other, (0, 64), tiles, ADDRESS, 32, guard, 1),
                        with_digest=with_digest,
                    ),
                )
    for dtype in round_kernel.DTYPES if has_fp8 else ():
        wide = [Tiles(16, 128 * dtype.itemsize)]
        tiles = tuple(found for layer in (wide, scaled) for found in tile_ranges([layer] * 32, 0, 32))
        sides = _side(64, wide), _side(64, scaled)
        yield (
            f"round {dtype}",
            partial(round_kernel.launch, *sides, (0, 64), tiles, ADDRESS, 32, ADDRESS, 1, dtype=dtype),
        )


def _side(block_size: int, layer: list[Tiles]) -> Side:
    block_bytes = 32 * block_size * sum(tiles.num_tiles * tiles.row_bytes for tiles in layer)
    return Side(ADDRESS, block_bytes, block_size, ADDRESS, 0)


def main(capability: int) -> int:
    target = GPUTarget("cuda", capability, 32)
    device = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    triton.runtime.driver.set_active(device)
    ops.force_triton = True
    own_tile, own_run = paged_attention.chunk_tile, JITFunction.run
    paged_attention.chunk_tile = lambda dim, dtype, is_roomy: own_tile(
        dim, dtype, capability // 10 in paged_attention.ROOMY
    )
    seen: set[int] = set()

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        kernel = own_run(self, *args, **{**kwargs, "warmup": True})
        shared = kernel.metadata.shared
        if id(kernel) not in seen:
            seen.add(id(kernel))
            print(
                f"{what}: {self.fn.__name__}, {len(kernel.asm['cubin'])} bytes, {shared} of shared memory", flush=True
            )
            if unset := unset_registers(kernel.asm["cubin"]):
                raise AssertionError(f"{self.fn.__name__} reads registers that nothing has set: {unset}")
        if shared > SHARED_BYTES[capability]:
            raise MemoryError(f"{self.fn.__name__} takes {shared} bytes of shared memory")

    JITFunction.run = run
    failed = 0
    with torch.inference_mode():
        for group in (of_transfers, of_rarer_models, of_starts):
            for what, task in group(divmod(capability, 10) >= OLDEST_FP8):
                try:
                    task()
                except Exception as error:
                    failed += 1
                    print(f"{what}: {type(error).__name__}: {error}", flush=True)
                triton_launch._compiled.clear()  # what it would launch by itself the next time
    print(f"{len(seen)} kernels compiled, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
