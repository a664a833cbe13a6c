"""Logits to tokens, for all rows of a step at once. Rows that are greedy and plain cost one argmax and nothing else.

Order: logit bias, min_tokens mask, penalties (over prompt and output as vLLM does), temperature, min_p, top_k, top_p,
then Gumbel-max. Its random numbers are a pure function of (seed, sequence index, output position, token id), so a
retry, a resume, another worker or another batch draws the same token. No state is kept between steps: penalties count
a row's own tokens again each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.request import SamplingParams, TokenLogprob
from engine.sequence import Row, RowResult

GREEDY_BELOW = 1e-5  # temperatures under it would overflow
_M32, _M64 = 2**32 - 1, 2**64 - 1
_TOP_P_GUESS = 1024  # candidates that nearly always hold the nucleus; else the row is sorted whole


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to draw: for sequence `index` at output position `offset`, from row `row` of the logits."""

    row: int
    index: int
    offset: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams


def sample(logits: torch.Tensor, rows: Sequence[Row], eos_token_ids: frozenset[int]) -> list[RowResult]:
    """logits float32 [num_rows, vocab_size], finite or the row fails. One result per row, in order."""
    results = [RowResult() for _ in rows]
    draws = [draw for i, row in enumerate(rows) if row.samples for draw in draws_of(i, row)]
    finite = torch.isfinite(logits.sum(-1))  # NaN and Inf survive a sum
    if all(_is_plain(draw) for draw in draws):
        packed = torch.stack([logits.argmax(-1), finite.long()]).tolist()  # one transfer
        tokens, good = [packed[0][draw.row] for draw in draws], packed[1]
    else:
        good = finite.tolist()
        draws = [draw for draw in draws if good[draw.row]]
        tokens = choose(logits, draws, eos_token_ids)
    logprobs = _logprobs(logits, draws, tokens)
    for draw, token, logprob in zip(draws, tokens, logprobs, strict=True):
        results[draw.row].tokens.append((token, logprob))
    for i, ok in enumerate(good):
        if not ok:
            results[i] = RowResult(error=("NON_FINITE_LOGITS", "the model's logits hold NaN or Inf"))
    return results


def choose(logits: torch.Tensor, draws: Sequence[Draw], eos_token_ids: frozenset[int]) -> list[int]:
    """The drawn tokens. `logits` is left as it is."""
    if not draws:
        return []
    scores = logits[[draw.row for draw in draws]]  # a copy
    for i, draw in enumerate(draws):
        _adjust(scores[i], draw, eos_token_ids)
    tokens = scores.argmax(-1)
    random = [i for i, draw in enumerate(draws) if draw.params.temperature >= GREEDY_BELOW]
    if random:
        chosen = [draws[i] for i in random]
        scores = scores[random] if len(random) < len(draws) else scores
        scores /= _column([d.params.temperature for d in chosen], scores)
        truncate(scores, [d.params for d in chosen])
        token_ids = torch.arange(scores.shape[-1], device=scores.device)
        bits = uniform_bits(
            [d.params.seed for d in chosen], [d.index for d in chosen], [d.offset for d in chosen], token_ids
        )
        tokens[random] = (scores + gumbel(bits)).argmax(-1)
    return tokens.tolist()


def uniform_bits(
    seeds: Sequence[int], sequence_indices: Sequence[int], positions: Sequence[int], token_ids: torch.Tensor
) -> torch.Tensor:
    """int64 [num_rows, num_token_ids] in [0, 2**32), the same bits on every device.

        h = splitmix64(splitmix64(splitmix64(seed) ^ sequence_index) ^ position)
        bits = mix32(mix32(token_id ^ low32(h)) ^ high32(h))

    mix32 is a two-round xorshift-multiply whose multipliers are below 2**31, so no int64 product overflows.
    """
    keys = [row_key(*row) for row in zip(seeds, sequence_indices, positions, strict=True)]
    low, high = torch.tensor([[k & _M32 for k in keys], [k >> 32 for k in keys]], device=token_ids.device)
    return mix32(mix32(token_ids[None] ^ low[:, None]).bitwise_xor_(high[:, None]))


def row_key(seed: int, sequence_index: int, position: int) -> int:
    """64 bits that name one draw."""
    return _splitmix64(_splitmix64(_splitmix64(seed) ^ sequence_index) ^ position)


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """float32 standard Gumbel noise from 32 uniform bits: -log of an exponential, precise where it is large."""
    uniform = bits.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def truncate(scores: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """min_p, top_k and top_p in place: what falls out becomes -inf. Ties at a threshold all stay in."""
    rows = [i for i, p in enumerate(params) if p.min_p > 0]
    if rows:
        part = scores[rows]
        floor = part.amax(-1, keepdim=True) + _column([params[i].min_p for i in rows], scores).log()
        scores[rows] = part.masked_fill_(part < floor, -torch.inf)
    rows = [i for i, p in enumerate(params) if 0 < p.top_k < scores.shape[-1]]
    if rows:
        part, ks = scores[rows], [params[i].top_k for i in rows]
        best = part.topk(max(ks)).values
        floor = best.gather(-1, torch.tensor(ks, device=scores.device)[:, None] - 1)
        scores[rows] = part.masked_fill_(part < floor, -torch.inf)
    rows = [i for i, p in enumerate(params) if p.top_p < 1]
    if rows:
        part = scores[rows]
        floor = _nucleus_floor(part, _column([params[i].top_p for i in rows], scores))
        scores[rows] = part.masked_fill_(part < floor, -torch.inf)


def _nucleus_floor(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[num_rows, 1]: the lowest score of the smallest set whose probability reaches top_p."""
    total = scores.logsumexp(-1, keepdim=True)
    best = scores.topk(min(_TOP_P_GUESS, scores.shape[-1])).values
    below = (best - total).exp().cumsum(-1) < top_p
    if best.shape[-1] < scores.shape[-1] and bool(below[:, -1].any()):
        best = scores.sort(-1, descending=True).values
        below = (best - total).exp().cumsum(-1) < top_p
    return best.gather(-1, below.sum(-1, keepdim=True).clamp_(max=best.shape[-1] - 1))


def _adjust(scores: torch.Tensor, draw: Draw, eos_token_ids: frozenset[int]) -> None:
    """Bias, min_tokens and penalties on one row [vocab_size], in place; each touches only the tokens it names."""
    params, device = draw.params, scores.device
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=device)
        scores[ids] += torch.tensor(list(params.logit_bias.values()), dtype=scores.dtype, device=device)
    if draw.offset < params.min_tokens:
        banned = params.stop_token_ids | (frozenset() if params.ignore_eos else eos_token_ids)
        if banned:
            scores[torch.tensor(list(banned), device=device)] = -torch.inf
    if params.repetition_penalty != 1:
        ids = torch.tensor(draw.token_ids, device=device).unique()
        seen = scores[ids]
        scores[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    output = draw.token_ids[draw.num_prompt_tokens :]
    if output and (params.frequency_penalty != 0 or params.presence_penalty != 0):
        ids, counts = torch.tensor(output, device=device).unique(return_counts=True)
        scores[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _logprobs(logits: torch.Tensor, draws: Sequence[Draw], tokens: Sequence[int]) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(draws)
    for i, draw in enumerate(draws):
        n = draw.params.logprobs
        if n is None:
            continue
        raw = logits[draw.row].log_softmax(-1)
        own = raw[tokens[i]]
        rank = int((raw > own).sum()) + 1
        best = raw.topk(min(n, raw.shape[-1]))
        values = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = tuple(TokenLogprob(token, value, r) for r, (token, value) in enumerate(values, start=1))
        found[i] = TokenLogprob(tokens[i], own.item(), rank, top)
    return found


def draws_of(i: int, row: Row) -> list[Draw]:
    sequence, request = row.sequence, row.sequence.request
    offset = row.stop - request.num_prompt_tokens
    return [
        Draw(i, sequence.index + fork, offset, sequence.token_ids, request.num_prompt_tokens, request.sampling)
        for fork in range(sequence.forks)
    ]


def _is_plain(draw: Draw) -> bool:
    params = draw.params
    return (
        params.temperature < GREEDY_BELOW
        and not params.logit_bias
        and not params.has_penalties
        and draw.offset >= params.min_tokens
    )


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def mix32(x: torch.Tensor) -> torch.Tensor:
    x = x ^ (x >> 16)
    x.mul_(0x21F0AAAD).bitwise_and_(_M32)
    x.bitwise_xor_(x >> 15)
    x.mul_(0x735A2D97).bitwise_and_(_M32)
    return x.bitwise_xor_(x >> 15)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _M64
    return x ^ (x >> 31)
