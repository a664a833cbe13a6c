"""Rotations looked up have the bits of those that transformers computes, for every kind that fused models have."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.rope_table import MOST_BYTES, RopeTable
from tests.engines import TINY

LENGTH = 512
KINDS = {
    "default": {},
    "linear": dict(factor=4.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "yarn": dict(factor=4.0, original_max_position_embeddings=128),
    "longrope": dict(
        short_factor=[1.0 + i / 8 for i in range(8)],
        long_factor=[2.0 + i for i in range(8)],
        factor=4.0,
        original_max_position_embeddings=LENGTH,
    ),
}


def rotary(kind: str) -> LlamaRotaryEmbedding:
    config = LlamaConfig(**TINY, rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **KINDS[kind]))
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_the_model(kind: str, dtype: torch.dtype) -> None:
    own, like = rotary(kind), torch.ones(3, dtype=dtype)
    table = RopeTable.of(own, LENGTH, like)
    assert table is not None
    generator = torch.Generator().manual_seed(1)
    for num_tokens in (1, 2, 5, 64, 300):
        positions = torch.randint(0, LENGTH, (1, num_tokens), generator=generator)
        for found, expected in zip(table(like, positions), own(like, positions), strict=True):
            assert found.dtype == dtype and found.is_contiguous() and torch.equal(found, expected)
    assert not torch.equal(table(like, torch.tensor([[3]]))[0], table(like, torch.tensor([[4]]))[0])


def test_what_depends_on_company_stays_as_it_is() -> None:
    own = rotary("default")

    def scaled(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part * (1 + positions.max()) for part in own(x, positions))

    assert RopeTable.of(scaled, LENGTH, torch.ones(1)) is None
    assert RopeTable.of(rotary("longrope"), LENGTH * 2, torch.ones(1)) is None, "it changes its factors on the way"


def test_a_table_has_its_limit() -> None:
    assert RopeTable.of(rotary("default"), MOST_BYTES // (2 * 16 * 4) + 1, torch.ones(1)) is None
