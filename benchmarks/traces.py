"""Request arrivals: public traces and Poisson processes, as one list of (when, how long a prompt, how long an answer).

    azure       CSV TIMESTAMP,ContextTokens,GeneratedTokens   Azure LLM inference trace 2023; cite Splitwise (ISCA 2024)
    mooncake    JSONL timestamp (ms), input_length, output_length, hash_ids: one per 512-token prefix block (FAST 2025)
    sharegpt    CSV prompt_tokens,output_tokens,...              lengths only; arrivals are Poisson at a given rate

Trace files are named by path and never part of this repository.
"""

import csv
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

MOONCAKE_BLOCK_TOKENS = 512
KINDS = ("azure", "mooncake", "sharegpt")


@dataclass(frozen=True, slots=True)
class Arrival:
    """`at_s` from the start of the run. Prompts share their first tokens as far as their `prefix_ids` agree."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()


def poisson(rate: float, duration_s: float, prompt_tokens: int, output_tokens: int, seed: int) -> list[Arrival]:
    """Independent arrivals, `rate` a second on average, all of one shape."""
    rng = random.Random(seed)
    arrivals, at_s = [], rng.expovariate(rate)
    while at_s < duration_s:
        arrivals.append(Arrival(at_s, prompt_tokens, output_tokens))
        at_s += rng.expovariate(rate)
    return arrivals


def read(kind: str, path: Path, rate: float | None = None, seed: int = 0) -> list[Arrival]:
    """A trace in order of arrival, from its first one on. `rate` is for traces without times alone.

    ValueError for an unknown kind, a sharegpt trace without rate, or a file that is not of its kind.
    """
    try:
        if kind == "azure":
            found = list(_azure(path))
        elif kind == "mooncake":
            found = list(_mooncake(path))
        elif kind == "sharegpt":
            if rate is None or rate <= 0:
                raise ValueError("a sharegpt trace has no times; it needs a rate above 0")
            found = list(_sharegpt(path, rate, seed))
        else:
            raise ValueError(f"trace kind is {kind!r}; allowed is one of {', '.join(KINDS)}")
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a {kind} trace: {error!r}") from error
    found = sorted((a for a in found if a.prompt_tokens > 0 and a.output_tokens > 0), key=lambda a: a.at_s)
    start = found[0].at_s if found else 0.0
    return [replace(a, at_s=a.at_s - start) for a in found]


def window(arrivals: Iterable[Arrival], speedup: float, duration_s: float | None, limit: int | None) -> list[Arrival]:
    """The trace `speedup` times as fast, its first `duration_s` seconds (of the run) and first `limit` requests."""
    faster = [replace(a, at_s=a.at_s / speedup) for a in arrivals]
    kept = [a for a in faster if duration_s is None or a.at_s < duration_s]
    return kept[:limit] if limit is not None else kept


def prompt_ids(arrival: Arrival, vocab_size: int, seed: int, number: int) -> list[int]:
    """Random ids: the same for the same (seed, number), and shared between arrivals as their prefix_ids say."""
    ids: list[int] = []
    for block in arrival.prefix_ids:
        if len(ids) >= arrival.prompt_tokens:
            break
        ids += _random_ids(f"{seed}/block/{block}", MOONCAKE_BLOCK_TOKENS, vocab_size)
    ids += _random_ids(f"{seed}/own/{number}", max(0, arrival.prompt_tokens - len(ids)), vocab_size)
    return ids[: arrival.prompt_tokens]


def _random_ids(name: str, count: int, vocab_size: int) -> list[int]:
    # Special tokens sit at either end of most vocabularies.
    low, high = (vocab_size // 10, vocab_size * 9 // 10) if vocab_size >= 100 else (0, vocab_size)
    return random.Random(name).choices(range(low, high), k=count)


def _azure(path: Path) -> Iterator[Arrival]:
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            # Seven digits of a second are one more than Python reads.
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])
            yield Arrival(at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake(path: Path) -> Iterator[Arrival]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            blocks = tuple(row.get("hash_ids", ()))
            yield Arrival(row["timestamp"] / 1e3, row["input_length"], row["output_length"], blocks)


def _sharegpt(path: Path, rate: float, seed: int) -> Iterator[Arrival]:
    rng = random.Random(seed)
    at_s = 0.0
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield Arrival(at_s, int(row["prompt_tokens"]), int(row["output_tokens"]))
            at_s += rng.expovariate(rate)
