"""The engine's vocabulary: what comes in (Request), what a step reports (events), what a hand-off needs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens are drawn. Checked on construction: ValueError names field, value and allowed range."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    num_sequences: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None  # top-N beside the sampled token; None: no logprobs at all

    def __post_init__(self) -> None:
        _check_number(self, "temperature", 0, math.inf, "a finite number >= 0")
        _check_number(self, "top_p", 0, 1, "in (0, 1]", open_low=True)
        _check_integer(self, "top_k", -1, 2**31 - 1)
        _check_number(self, "min_p", 0, 1, "in [0, 1]")
        _check_number(self, "presence_penalty", -2, 2, "in [-2, 2]")
        _check_number(self, "frequency_penalty", -2, 2, "in [-2, 2]")
        _check_number(self, "repetition_penalty", 0, 10, "in (0, 10]", open_low=True)
        _check_integer(self, "seed", 0, 2**64 - 1)
        _check_integer(self, "num_sequences", 1, 1024)
        _check_integer(self, "max_tokens", 1, 2**31 - 1)
        _check_integer(self, "min_tokens", 0, self.max_tokens)
        if self.logprobs is not None:
            _check_integer(self, "logprobs", 0, 1024)
        for token_id, bias in self.logit_bias.items():
            if not isinstance(token_id, int) or token_id < 0:
                raise ValueError(f"logit_bias: token id {token_id!r} is not an integer >= 0")
            if not (_is_number(bias) and -100 <= bias <= 100):
                raise ValueError(f"logit_bias[{token_id}]: {bias!r} is not in [-100, 100]")
        for token_id in self.stop_token_ids:
            if not isinstance(token_id, int) or token_id < 0:
                raise ValueError(f"stop_token_ids: {token_id!r} is not an integer >= 0")

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class Request:
    id: str  # unique in this engine
    token_ids: tuple[int, ...]  # the prompt, then output already committed by an earlier attempt
    num_prompt_tokens: int  # output position p is token_ids[num_prompt_tokens + p]
    sampling: SamplingParams
    priority: int = 0  # lower first
    namespace: bytes = b""  # salts the prefix hashes
    use_prefix_cache: bool = True  # False: neither reads nor fills it


class FinishReason(Enum):
    STOP = "stop"  # EOS or a stop token
    LENGTH = "length"  # max_tokens or max_model_len


@dataclass(frozen=True, slots=True)
class Finish:
    reason: FinishReason
    eos_token_id: int | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Of the raw log-softmax: before bias, penalties, temperature and truncation. `rank` counts from 1."""

    token_id: int
    logprob: float
    rank: int
    top: tuple["TokenLogprob", ...] = ()


# ---- events: one list per engine step, in order


@dataclass(frozen=True, slots=True)
class Started:
    """The first chunk of the prompt is being launched."""

    request_id: str
    num_cached_tokens: int
    num_returned_tokens: int = 0  # those of them whose KV a decode worker made and returned


@dataclass(frozen=True, slots=True)
class Token:
    request_id: str
    sequence_index: int
    offset: int  # output position
    token_id: int
    logprob: TokenLogprob | None = None
    finish: Finish | None = None  # set with the sequence's last token


@dataclass(frozen=True, slots=True)
class Preempted:
    """The sequence lost its blocks; it is queued and will be recomputed."""

    request_id: str
    sequence_index: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The request is over and its blocks are free. `reason` is an ErrorReason's name without its prefix."""

    request_id: str
    reason: str
    message: str

    @property
    def retryable(self) -> bool:
        """Whether another attempt, at another worker or later, may well succeed."""
        return self.reason == "OUT_OF_MEMORY"


Event = Started | Token | Preempted | Failed


# ---- hand-off


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What the prefill side sampled for one sequence; `finished`: it ended with that token."""

    token_id: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks granted to `owner`: logical block i of the prompt is block_ids[i]. The cached ones are filled already."""

    owner: str
    block_ids: tuple[int, ...]
    num_cached_tokens: int  # a multiple of block_size
    generation: int  # grows with every grant of this engine


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_number(
    params: SamplingParams, name: str, low: float, high: float, allowed: str, open_low: bool = False
) -> None:
    value = getattr(params, name)
    if not _is_number(value) or not low <= value <= high or (open_low and value <= low):
        raise ValueError(f"{name}: {value!r} is not {allowed}")


def _check_integer(params: SamplingParams, name: str, low: int, high: int) -> None:
    value = getattr(params, name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} is not an integer in [{low}, {high}]")


def find_finish(
    request: Request, offset: int, token_id: int, eos_token_ids: frozenset[int], max_model_len: int
) -> Finish | None:
    """Whether the token at output position `offset` ends its sequence. EOS and stop ids count from min_tokens on."""
    sampling = request.sampling
    if offset >= sampling.min_tokens:
        if token_id in eos_token_ids and not sampling.ignore_eos:
            return Finish(FinishReason.STOP, eos_token_id=token_id)
        if token_id in sampling.stop_token_ids:
            return Finish(FinishReason.STOP, stop_token_id=token_id)
    return Finish(FinishReason.LENGTH) if is_last(request, offset, max_model_len) else None


def is_last(request: Request, offset: int, max_model_len: int) -> bool:
    """Whether output position `offset` is the last one there can be, whatever token comes there."""
    return offset + 1 >= request.sampling.max_tokens or request.num_prompt_tokens + offset + 1 >= max_model_len
