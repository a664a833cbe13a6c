"""The kernel that rounds to float8 as it pushes, in Triton's interpreter or on a GPU, against what engines write."""

import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from engine.kv_layout import FP8
from kv_transfer import push_kernel, round_kernel
from kv_transfer.base import BlockMemory
from kv_transfer.push_kernel import Side
from kv_transfer.rounding import RoundedMemory
from tests.interpreter import patch as patch_interpreter
from tests.interpreter import total
from tests.rounding import written

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MINE, THEIRS = [7, 2, 9, 0, 4, 11], [3, 8, 1, 10, 6, 5]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        patch_interpreter(monkeypatch)


def pool(dtype: str, kv_dtype: str | None, block_size: int, block_ids: list[int], num_tokens: int) -> BlockMemory:
    memory = written(dtype, kv_dtype, block_size, block_ids, num_tokens)
    return replace(memory, slab=memory.slab.to(DEVICE))


def ids(pages: list[int]) -> torch.Tensor:
    return torch.tensor(pages, dtype=torch.int32, device=DEVICE)


def side(memory: BlockMemory, pages: torch.Tensor) -> Side:
    return Side(memory.slab.data_ptr(), memory.slab.shape[1], memory.block_size, pages.data_ptr(), 0)


def push(source: RoundedMemory, target: BlockMemory, span: tuple[int, int], layers: tuple[int, int], **guard) -> int:
    mine, theirs = ids(MINE), ids(THEIRS)
    digest = 0
    for tiles in source.rounded_ranges(*layers):
        sums = torch.full((3,), 77, dtype=torch.int64, device=DEVICE)
        sides = side(source, mine), side(target, theirs)
        round_kernel.launch(*sides, span, tiles, sums.data_ptr(), 3, **guard, dtype=source.rows_dtype)
        digest += total(sums.cpu())
    return digest % 2**64


def digest_of(memory: BlockMemory, span: tuple[int, int], layers: tuple[int, int]) -> int:
    theirs, digest = ids(THEIRS), 0
    for tiles in memory.tile_ranges(*layers):
        sums = torch.full((2,), 77, dtype=torch.int64, device=DEVICE)
        push_kernel.launch(side(memory, theirs), None, span, tiles, sums.data_ptr(), 2)
        digest += total(sums.cpu())
    return digest % 2**64


# Dtypes and block sizes have nothing to do with each other, and a GPU compiles kernels for each pair.
@pytest.mark.parametrize(
    "dtype, sizes",
    [
        *(("bfloat16", sizes) for sizes in ((16, 16), (16, 32), (32, 16), (16, 48))),
        ("float32", (16, 16)),
        ("float16", (16, 16)),
    ],
    ids=str,
)
def test_the_receivers_pool_holds_what_its_engine_would_have_written(dtype: str, sizes: tuple[int, int]):
    """From token 32 on; the tokens before are there."""
    source = RoundedMemory.of(pool(dtype, None, sizes[0], MINE, 80))
    wanted, target = (pool(dtype, FP8, sizes[1], THEIRS, count) for count in (80, 32))
    for layers in ((0, 1), (1, 3)):
        digest = push(source, target, (32, 80), layers)
        assert digest == digest_of(target, (32, 80), layers) == digest_of(wanted, (32, 80), layers)
    assert torch.equal(target.slab, wanted.slab)


def test_the_same_from_the_host():
    source = RoundedMemory.of(pool("bfloat16", None, 16, MINE, 90))
    target = pool("bfloat16", FP8, 16, THEIRS, 0)
    push(source, target, (0, 96), (0, 3))
    (read,) = source.read(MINE, 0, 3)
    assert torch.equal(target.slab[THEIRS].cpu().view(-1), torch.from_numpy(read))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits(dtype: str):
    """Beside others that set the scale, and in rows of their like."""
    memory = pool(dtype, None, 16, MINE, 0)
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    numbers = torch.where(numbers.isfinite(), numbers, 1)
    pages = memory.slab.view(numbers.dtype)
    step = len(MINE) * pages.shape[1]
    for start in range(0, 2**16, step):
        for order in (torch.arange(step), torch.randperm(step)):
            pages[MINE] = numbers[(start + order) % 2**16].view(len(MINE), -1).to(DEVICE)
            source, target = RoundedMemory.of(memory), pool(dtype, FP8, 16, THEIRS, 0)
            push(source, target, (0, 96), (0, 3))
            (wanted,) = source.read(MINE, 0, 3)
            assert torch.equal(target.slab[THEIRS].cpu().view(-1), torch.from_numpy(wanted))


def test_damage_of_any_byte_is_seen():
    source = RoundedMemory.of(pool("bfloat16", None, 16, MINE, 32))
    target = pool("bfloat16", FP8, 16, THEIRS, 0)
    right = push(source, target, (0, 32), (0, 3))
    assert right == digest_of(target, (0, 32), (0, 3))
    generator = torch.Generator().manual_seed(0)
    places = [int(torch.randint(target.slab.shape[1], (1,), generator=generator)) for _ in range(12)]
    places += [target.layer_offsets[1] - 1, target.slab.shape[1] - 1]  # scales
    for at in places:
        target.slab[THEIRS[1], at] ^= 4
        assert digest_of(target, (0, 32), (0, 3)) != right
        target.slab[THEIRS[1], at] ^= 4


def test_a_revoked_guard_stops_every_write():
    source = RoundedMemory.of(pool("bfloat16", None, 16, MINE, 32))
    target = pool("bfloat16", FP8, 16, THEIRS, 0)
    guard = torch.tensor([41], dtype=torch.int64, device=DEVICE)
    assert push(source, target, (0, 32), (0, 3), guard=guard.data_ptr(), generation=42) == 0
    assert not target.slab.any()
    assert push(source, target, (0, 32), (0, 3), guard=guard.data_ptr(), generation=41) != 0
    assert target.slab.any()
