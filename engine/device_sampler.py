"""sampler.py's rules for a whole step on the device, without waiting for it: same order, same random bits.

pick() draws for every row at once, greedy or plain random, and fits a captured graph. Rows that ask for more (bias,
min_tokens, penalties, truncation, several sequences, logprobs) are drawn again by Draws; a row's answer then replaces
what pick() chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine import ops
from engine.request import TokenLogprob
from engine.sampler import GREEDY_BELOW, Draw, draws_of, gumbel, mix32, row_key, truncate
from engine.sequence import Row

_M32 = 2**32 - 1


class Picker:
    """Workspace of pick(). The tokens of row i stay in `tokens[i]` for the next step to read."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device):
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._block, self._steps = 1024, 4
        self._parts = -(-vocab_size // (self._block * self._steps))
        self._best = torch.empty(max_rows * self._parts, dtype=torch.float32, device=device)
        self._best_token = torch.empty(max_rows * self._parts, dtype=torch.int32, device=device)

    def pick(
        self,
        logits: torch.Tensor,  # [num_rows, vocab_size]
        keys: torch.Tensor,  # int32 [2, num_rows]: the random key's low and high half
        temperatures: torch.Tensor,  # float32 [num_rows], 0: greedy
        out: torch.Tensor,  # int64 [num_rows]: the token, -1 where a row's logits hold NaN or Inf
        check: bool = True,
    ) -> None:
        num_rows, vocab_size = logits.shape
        if not num_rows:
            return
        if not ops.uses_triton(logits):
            _reference_pick(logits, keys, temperatures, out, check)
            return
        from engine.triton_sample import pick_kernel, pick_last_kernel

        pick_kernel[(num_rows, self._parts)](
            logits,
            self._best,
            self._best_token,
            keys,
            temperatures,
            logits.stride(0),
            vocab_size,
            num_rows,
            CHECK=check,
            BLOCK=self._block,
            STEPS=self._steps,
            num_warps=4,
        )
        pick_last_kernel[(num_rows,)](
            self._best, self._best_token, out, self._parts, PARTS=ops.power_of_two(self._parts), num_warps=1
        )


def _reference_pick(logits, keys, temperatures, out, check) -> None:
    scores = logits.float()
    bad = ~torch.isfinite(scores.sum(-1))
    random = temperatures > 0
    if random.any():
        low, high = (keys[:, random].long() & _M32).unsqueeze(-1)
        token_ids = torch.arange(scores.shape[1], device=scores.device)
        bits = mix32(mix32(token_ids[None] ^ low).bitwise_xor_(high))
        scores = scores.clone()
        scores[random] = scores[random] / temperatures[random, None] + gumbel(bits)
    out.copy_(scores.argmax(-1))
    if check:
        out[bad] = -1


class Draws:
    """The draws of one step that are more than a pick. Everything is sent at once, nothing is waited for."""

    def __init__(self, rows: Sequence[Row], vocab_size: int, eos_token_ids: frozenset[int], device: torch.device):
        self._vocab_size, self._eos, self._device = vocab_size, eos_token_ids, device
        self.draws = [d for i, row in enumerate(rows) if row.samples and _is_special(row) for d in draws_of(i, row)]

    def launch(self, logits: torch.Tensor, last_ids: torch.Tensor, picker: Picker) -> "Drawn":
        """logits [num_rows, vocab_size]; last_ids int64 [num_rows]: the token that each row just fed."""
        draws = self.draws
        rows = self._send([d.row for d in draws])
        raw = logits[rows].float()
        scores = raw.clone()
        self._adjust(scores, rows, last_ids)
        greedy = [d.params.temperature < GREEDY_BELOW for d in draws]
        temperatures = [1.0 if g else d.params.temperature for d, g in zip(draws, greedy, strict=True)]
        scores /= self._send(temperatures, torch.float32)[:, None]
        chosen = [i for i, g in enumerate(greedy) if not g]
        if any(_truncates(draws[i], self._vocab_size) for i in chosen):
            self._truncate(scores, greedy)
        keys = [row_key(d.params.seed, d.index, d.offset) for d in draws]
        halves = [_signed(k & _M32) for k in keys] + [_signed(k >> 32) for k in keys]
        noise = self._send([0.0 if g else 1.0 for g in greedy], torch.float32)
        tokens = torch.empty(len(draws), dtype=torch.int64, device=self._device)
        space = Picker(len(draws), self._vocab_size, self._device)
        space.pick(scores, self._send(halves, torch.int32).view(2, -1), noise, tokens, check=False)
        firsts = [i for i, d in enumerate(draws) if not i or draws[i - 1].row != d.row]
        at = self._send([draws[i].row for i in firsts])
        picked = picker.tokens[at]
        picker.tokens[at] = torch.where(picked < 0, picked, tokens[self._send(firsts)])
        return Drawn(draws, _fetch(tokens), self._logprobs(raw, tokens))

    def _adjust(self, scores: torch.Tensor, rows: torch.Tensor, last_ids: torch.Tensor) -> None:
        """Bias, min_tokens and penalties, in place; `scores` [num_draws, vocab_size]."""
        flat, size = scores.view(-1), self._vocab_size
        at, values = [], []
        for i, draw in enumerate(self.draws):
            for token, value in draw.params.logit_bias.items():
                at.append(i * size + token)
                values.append(value)
        if at:
            flat.index_add_(0, self._send(at), self._send(values, torch.float32))
        banned = []
        for i, draw in enumerate(self.draws):
            if draw.offset < draw.params.min_tokens:
                ids = draw.params.stop_token_ids | (frozenset() if draw.params.ignore_eos else self._eos)
                banned += [i * size + token for token in ids]
        if banned:
            flat.index_fill_(0, self._send(banned), -torch.inf)
        chosen = [i for i, draw in enumerate(self.draws) if draw.params.has_penalties]
        if not chosen:
            return
        seen, output = [], []
        extra = []  # draws whose last token only the device knows: it was fed in this very step
        for k, i in enumerate(chosen):
            draw = self.draws[i]
            seen += [k * size + token for token in draw.token_ids]
            output += [k * size + token for token in draw.token_ids[draw.num_prompt_tokens :]]
            if len(draw.token_ids) < draw.num_prompt_tokens + draw.offset:
                extra.append(k)
        counts = torch.zeros(len(chosen) * size, device=self._device)
        if output:
            places = self._send(output)
            counts.index_add_(0, places, torch.ones_like(places, dtype=torch.float32))
        mask = torch.zeros(len(chosen) * size, dtype=torch.bool, device=self._device)
        mask.index_fill_(0, self._send(seen), True)
        if extra:
            late = last_ids[rows[self._send([chosen[k] for k in extra])]]
            places = self._send(extra) * size + late
            counts.index_add_(0, places, torch.ones_like(places, dtype=torch.float32))
            mask.index_fill_(0, places, True)
        params = [self.draws[i].params for i in chosen]
        repetition, frequency, presence = (
            self._send([getattr(p, name) for p in params], torch.float32)[:, None]
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        )
        counts, mask = counts.view(-1, size), mask.view(-1, size)
        here = self._send(chosen)
        part = scores[here]
        part = torch.where(mask, torch.where(part > 0, part / repetition, part * repetition), part)
        part = torch.where(counts > 0, part - (frequency * counts + presence), part)
        scores[here] = part

    def _truncate(self, scores: torch.Tensor, greedy: Sequence[bool]) -> None:
        if not ops.uses_triton(scores):
            rows = [i for i, g in enumerate(greedy) if not g]
            part = scores[rows]
            truncate(part, [self.draws[i].params for i in rows])
            scores[rows] = part
            return
        from engine.triton_sample import truncate_kernel

        params = [d.params for d in self.draws]
        min_ps = [0.0 if g else p.min_p for p, g in zip(params, greedy, strict=True)]
        top_ks = [
            p.top_k if 0 < p.top_k < self._vocab_size and not g else 0 for p, g in zip(params, greedy, strict=True)
        ]
        top_ps = [1.0 if g else p.top_p for p, g in zip(params, greedy, strict=True)]
        truncate_kernel[(len(params),)](
            scores,
            self._send(min_ps, torch.float32),
            self._send(top_ks, torch.int32),
            self._send(top_ps, torch.float32),
            self._vocab_size,
            BLOCK=4096,
            num_warps=16,
        )

    def _logprobs(self, raw: torch.Tensor, tokens: torch.Tensor) -> "list[torch.Tensor] | None":
        """Own logprob and rank, then the best, of those draws that ask; on their way to the host."""
        chosen = [i for i, d in enumerate(self.draws) if d.params.logprobs is not None]
        if not chosen:
            return None
        here = self._send(chosen)
        logprobs = raw[here].log_softmax(-1)
        own = logprobs.gather(1, tokens[here][:, None])
        rank = (logprobs > own).sum(-1) + 1
        most = max(self.draws[i].params.logprobs or 0 for i in chosen)
        best = logprobs.topk(min(most, self._vocab_size))
        return [_fetch(x) for x in (own[:, 0], rank, best.values, best.indices)]

    def _send(self, values: Sequence, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        if self._device.type == "cpu":
            return torch.tensor(values, dtype=dtype)
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(self._device, non_blocking=True)


@dataclass(slots=True)
class Drawn:
    """Tokens and logprobs on their way to the host; to be read once the step's event has passed."""

    draws: list[Draw]
    tokens: torch.Tensor
    parts: list[torch.Tensor] | None

    def read(self) -> list[tuple[int, int, TokenLogprob | None]]:
        """(row, token, logprob) of each draw, in order."""
        tokens = self.tokens.tolist()
        found: list[TokenLogprob | None] = [None] * len(tokens)
        if self.parts is not None:
            own, ranks, values, ids = (part.tolist() for part in self.parts)
            asked = [i for i, d in enumerate(self.draws) if d.params.logprobs is not None]
            for k, i in enumerate(asked):
                best = list(zip(ids[k], values[k], strict=True))[: self.draws[i].params.logprobs]
                top = tuple(TokenLogprob(token, value, r) for r, (token, value) in enumerate(best, start=1))
                found[i] = TokenLogprob(tokens[i], own[k], ranks[k], top)
        return [(d.row, token, logprob) for d, token, logprob in zip(self.draws, tokens, found, strict=True)]


def _is_special(row: Row) -> bool:
    p = row.sequence.request.sampling
    offset = row.stop - row.sequence.request.num_prompt_tokens
    truncated = p.temperature >= GREEDY_BELOW and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
    return bool(
        row.sequence.forks > 1
        or p.logit_bias
        or p.has_penalties
        or offset < p.min_tokens
        or truncated
        or p.logprobs is not None
    )


def _truncates(draw: Draw, vocab_size: int) -> bool:
    p = draw.params
    return p.min_p > 0 or p.top_p < 1 or 0 < p.top_k < vocab_size


def _fetch(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, complete once the stream has come this far."""
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x
