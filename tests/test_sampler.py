"""Sampling: the random bits against plain integers, each parameter against its definition, rows independent of rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import Request, SamplingParams
from engine.sampler import Draw, choose, gumbel, row_key, sample, truncate, uniform_bits
from engine.sequence import Row, Sequence

M32, M64 = 2**32 - 1, 2**64 - 1
EOS = frozenset({2})


def reference_bits(seed: int, sequence_index: int, position: int, token_id: int) -> int:
    """The definition in docs and docstring, in plain integers."""

    def splitmix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & M64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
        return x ^ (x >> 31)

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & M32
        x = ((x ^ (x >> 15)) * 0x735A2D97) & M32
        return x ^ (x >> 15)

    key = splitmix(splitmix(splitmix(seed) ^ sequence_index) ^ position)
    return mix(mix(token_id ^ (key & M32)) ^ (key >> 32))


VECTORS = {  # (seed, sequence index, position, token id): bits
    (0, 0, 0, 0): 0xD3E5BBF4,
    (1, 0, 0, 0): 0x7F8B24C2,
    (0, 1, 0, 0): 0xA0081937,
    (0, 0, 1, 0): 0xF66CA4F6,
    (0, 0, 0, 1): 0xFC5013FB,
    (2**64 - 1, 7, 4095, 128255): 0x339B58B5,
}


@pytest.mark.parametrize(("row", "bits"), VECTORS.items())
def test_uniform_bits_vectors(row: tuple[int, int, int, int], bits: int) -> None:
    seed, index, position, token = row
    assert reference_bits(*row) == bits
    assert uniform_bits([seed], [index], [position], torch.tensor([token])).tolist() == [[bits]]


@given(
    st.lists(st.tuples(st.integers(0, M64), st.integers(0, 1000), st.integers(0, 10**6)), min_size=1, max_size=4),
    st.lists(st.integers(0, 2**20), min_size=1, max_size=8),
)
@settings(max_examples=50, deadline=None)
def test_uniform_bits_equal_the_reference(rows: list[tuple[int, int, int]], tokens: list[int]) -> None:
    seeds, indices, positions = zip(*rows, strict=True)
    found = uniform_bits(seeds, indices, positions, torch.tensor(tokens))
    assert found.tolist() == [[reference_bits(*row, token) for token in tokens] for row in rows]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_uniform_bits_equal_on_cuda() -> None:
    tokens = torch.arange(128256)
    rows = ([3, M64], [0, 5], [17, 100000])
    assert torch.equal(uniform_bits(*rows, tokens), uniform_bits(*rows, tokens.cuda()).cpu())


def test_bits_are_uniform_and_noise_is_gumbel() -> None:
    bits = uniform_bits(list(range(8)), [0] * 8, [5] * 8, torch.arange(50_000))
    assert abs(bits.double().mean().item() / 2**32 - 0.5) < 2e-3
    for bit in range(32):
        assert abs(((bits >> bit) & 1).double().mean().item() - 0.5) < 4e-3, bit
    noise = gumbel(bits)
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.5772) < 0.01 and abs(noise.std().item() - math.pi / 6**0.5) < 0.01
    assert gumbel(torch.tensor([0, M32])).isfinite().all()


def draw(row: int = 0, index: int = 0, offset: int = 0, tokens=(1,), num_prompt: int | None = None, **params) -> Draw:
    return Draw(row, index, offset, list(tokens), num_prompt or len(tokens), SamplingParams(**params))


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    draws = [draw(offset=i, seed=i % 7, temperature=0.5) for i in range(8000)]
    tokens = torch.tensor(choose(logits, draws, EOS))
    share = torch.bincount(tokens, minlength=4) / len(draws)
    torch.testing.assert_close(share, (logits[0] / 0.5).softmax(-1), atol=0.02, rtol=0)


def test_company_changes_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 997) * 3
    kinds = [
        dict(temperature=0),
        dict(temperature=0.7, seed=5, top_p=0.9),
        dict(temperature=1.3, seed=6, top_k=20, logprobs=2),
        dict(temperature=1, seed=7, min_p=0.05, repetition_penalty=1.3),
        dict(temperature=1, seed=8, presence_penalty=1, frequency_penalty=-0.5, logit_bias={5: 3.0}),
        dict(temperature=1, seed=9, top_p=0.5, top_k=50, min_p=0.01),
    ]
    before = logits.clone()
    draws = [draw(i, index=i % 2, offset=i, tokens=range(40), num_prompt=30, **kind) for i, kind in enumerate(kinds)]
    together = choose(logits, draws, EOS)
    assert torch.equal(logits, before)
    assert together == [choose(logits, [d], EOS)[0] for d in draws]
    assert together[::-1] == choose(logits, draws[::-1], EOS)


def kept(logits: list[float], **params) -> list[int]:
    scores = torch.tensor([logits])
    truncate(scores, [SamplingParams(**params)])
    return scores[0].isfinite().nonzero().flatten().tolist()


def test_truncation() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert kept(logits, top_k=2) == [0, 1]
    assert kept(logits, top_k=-1) == kept(logits, top_k=0) == kept(logits, top_k=99) == [0, 1, 2, 3]
    assert kept(logits, top_p=0.39) == [0]
    assert kept(logits, top_p=0.41) == [0, 1]
    assert kept(logits, top_p=0.95) == [0, 1, 2, 3]
    assert kept(logits, top_p=1e-6) == [0]
    assert kept(logits, min_p=0.5) == [0, 1, 2]
    assert kept(logits, min_p=1) == [0]
    assert kept(logits, top_k=3, top_p=0.5) == [0, 1]  # of what top_k left: 0.44 + 0.33
    assert kept([1.0, 1.0, 0.0], top_k=1) == [0, 1]  # ties stay


def test_nucleus_of_a_flat_distribution_sorts_the_whole_row() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 5000) * 0.1
    reference = scores.clone()
    truncate(scores, [SamplingParams(top_p=0.9), SamplingParams(top_p=0.1)])
    for row, top_p in enumerate((0.9, 0.1)):
        p, order = reference[row].softmax(-1).sort(descending=True)
        size = int((p.cumsum(-1) < top_p).sum()) + 1
        assert set(order[:size].tolist()) == set(scores[row].isfinite().nonzero().flatten().tolist())


def greedy(logits: list[float], tokens=(0,), num_prompt: int = 1, offset: int = 0, **params) -> int:
    return choose(
        torch.tensor([logits]),
        [draw(offset=offset, tokens=tokens, num_prompt=num_prompt, temperature=0, **params)],
        EOS,
    )[0]


def test_penalties_and_bias() -> None:
    assert greedy([1.0, 0.9, 0.0]) == 0
    assert greedy([1.0, 0.9, 0.0], repetition_penalty=1.2) == 1  # the prompt counts
    assert greedy([-1.0, -1.1, -2.0], repetition_penalty=1.2) == 1
    assert greedy([1.0, 0.9, 0.0], presence_penalty=2) == 0  # the prompt does not count
    assert greedy([1.0, 0.9, 0.0], tokens=(1, 0), presence_penalty=0.2) == 1
    assert greedy([1.0, 0.9, 0.5], tokens=(2, 0, 0, 1), frequency_penalty=0.2) == 1
    assert greedy([1.0, 0.9, 0.0], tokens=(1, 2), frequency_penalty=-1.1) == 2
    assert greedy([1.0, 0.9, 0.0], logit_bias={2: 1.5}) == 2
    assert greedy([1.0, 0.9, 0.0], logit_bias={0: -100}) == 1


def test_min_tokens_bans_eos_and_stop_ids_until_then() -> None:
    logits = [0.0, 1.0, 3.0, 2.0]
    stop = dict(stop_token_ids=frozenset({3}), min_tokens=4, max_tokens=9)
    assert greedy(logits, offset=3, **stop) == 1
    assert greedy(logits, offset=4, **stop) == 2
    assert greedy(logits, offset=3, ignore_eos=True, **stop) == 2


def row_of(tokens: list[int], num_computed: int, forks: int = 1, **params) -> Row:
    request = Request("r", tuple(tokens), len(tokens), SamplingParams(**params))
    return Row(Sequence(request, 0, tokens, 0, forks=forks), num_computed, len(tokens) - num_computed)


def test_rows_to_results() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 50)
    logits[2, 7] = torch.nan
    partial = Row(row_of([1, 2, 3], 0, temperature=0).sequence, 0, 2)
    rows = [
        row_of([1, 2], 1, temperature=0, logprobs=3),
        row_of([1, 2], 0, forks=3, seed=4, num_sequences=3),
        row_of([1], 0, temperature=0),
        partial,
    ]
    results = sample(logits, rows, EOS)
    raw = logits[0].log_softmax(-1)
    ((token, logprob),) = results[0].tokens
    assert token == raw.argmax() and logprob.rank == 1 and logprob.logprob == pytest.approx(raw.max().item())
    assert [t.token_id for t in logprob.top] == raw.topk(3).indices.tolist() and logprob.top[0].token_id == token
    assert len(results[1].tokens) == 3 and len({t for t, _ in results[1].tokens}) > 1
    assert results[2].error is not None and results[2].error[0] == "NON_FINITE_LOGITS" and not results[2].tokens
    assert results[3].tokens == [] and results[3].error is None
    alone = sample(logits[:1], rows[:1], EOS)
    assert alone[0] == results[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_fail_on_the_greedy_path_too(bad: float) -> None:
    logits = torch.randn(2, 30)
    logits[1, 3] = bad
    good, failed = sample(logits, [row_of([1], 0, temperature=0), row_of([1], 0, temperature=0)], EOS)
    assert good.error is None and failed.error is not None


def test_rank_counts_those_above() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    ((_, found),) = sample(logits, [row_of([1], 0, temperature=0, logit_bias={2: 50.0}, logprobs=0)], EOS)[0].tokens
    assert found.token_id == 2 and found.rank == 3 and found.top == ()
    assert found.logprob == pytest.approx(logits[0].log_softmax(-1)[2].item())  # raw: the bias is not in it


FIELDS = {
    "temperature": [-0.1, math.nan, math.inf, "1", True],
    "top_p": [0, -1, 1.1, math.nan],
    "top_k": [-2, 2**31, 1.5, math.nan],
    "min_p": [-0.1, 1.1, math.nan],
    "presence_penalty": [-2.1, 2.1, math.inf],
    "frequency_penalty": [-2.1, 2.1, math.nan],
    "repetition_penalty": [0, -1, 10.1, math.nan],
    "seed": [-1, 2**64, 0.5],
    "num_sequences": [0, -1, 2**31],
    "max_tokens": [0, -1, 2**31, 1.0],
    "min_tokens": [-1, 17],
    "logprobs": [-1, 2**31],
    "logit_bias": [{-1: 0.0}, {0: 101}, {0: math.nan}],
    "stop_token_ids": [frozenset({-1}), frozenset({"a"})],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FIELDS.items() for value in values])
def test_bad_parameters_name_field_and_value(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@given(
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 5),
        top_p=st.floats(1e-6, 1),
        top_k=st.integers(-1, 60),
        min_p=st.floats(0, 1),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        repetition_penalty=st.floats(0.01, 10),
        seed=st.integers(0, M64),
        logit_bias=st.dictionaries(st.integers(0, 39), st.floats(-100, 100), max_size=4),
    ),
    st.integers(0, 2**20),
)
@settings(max_examples=150, deadline=None)
def test_any_valid_parameters_draw_a_possible_token(params: SamplingParams, offset: int) -> None:
    logits = torch.linspace(-4, 4, 40)[None]
    (token,) = choose(logits, [Draw(0, 0, offset, [1, 2, 3], 2, params)], EOS)
    assert 0 <= token < 40
    assert row_key(params.seed, 0, offset) != row_key(params.seed, 1, offset)
