"""One engine in a process of its own: reads a point a line, measures it, answers with a line of JSON.

Steps are timed one by one. `decode`: the whole batch decodes, a step lies between two times at which every row got a
token; the median of each window of steps. `prefill`: from submission to the last prompt's first token. `mixed`: while
the batch decodes, prompts of 512 tokens arrive every few steps; the time of all steps with prompts, less what as many
plain steps take (timed right before and after), is what the prompts cost together. Engines run ahead of their answers,
so the time of the one step that answers a prompt says nothing.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.engine_cuda_shapes import LONG, PROMPT, Point
from engine.imports import no_collections

MAX_NUM_SEQS, MAX_TOKENS = 256, 8192
WINDOW_STEPS = 24
MIXED_PROMPTS, MIXED_EVERY = 16, 4


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 30000), k=length)


class Ours:
    """The engine's own thread runs; a queue of (time, ids that got a token) takes the place of step()."""

    def __init__(self, path: Path, options: argparse.Namespace):
        import queue

        from engine.config import EngineConfig
        from engine.engine import Engine
        from engine.request import Token

        self._queue: queue.SimpleQueue = queue.SimpleQueue()

        def listen(events) -> None:
            ids = [event.request_id for event in events if isinstance(event, Token)]
            failed = [event for event in events if type(event).__name__ == "Failed"]
            if ids or failed:
                self._queue.put((time.perf_counter(), failed or ids))

        config = EngineConfig(
            str(path),
            dtype="bfloat16",
            device="cuda",
            load_format="dummy",
            enable_prefix_caching=False,
            max_num_batched_tokens=MAX_TOKENS,
            max_num_seqs=MAX_NUM_SEQS,
            max_model_len=options.max_model_len,
            gpu_memory_utilization=options.utilization,
            kv_cache_gib=options.kv_gib or None,
        )
        self.engine = Engine(config, listen, lambda line: print("  ", line, file=sys.stderr, flush=True))
        self.engine.start()
        self.kv_gib = self.engine.slab.numel() / 2**30
        self._ran: set[str] = set()
        self._watch()

    def _watch(self) -> None:
        """Notes which attention a step ran."""
        from engine import paged_batch, steps, torch_prefill

        def note(module: Any, name: str, what: str) -> None:
            own = getattr(module, name)

            def noted(*args, **kwargs):
                self._ran.add(what)
                return own(*args, **kwargs)

            setattr(module, name, noted)

        note(torch_prefill, "_cudnn", "cuDNN")
        note(paged_batch, "attend_chunks", "Triton")
        note(steps._Graph, "replay", "Triton in a graph")

    def settle(self) -> None:
        """Until the engine has made what it makes while idle: it would disturb others on the device."""
        deadline = time.perf_counter() + 30
        while not self.engine.is_warm and time.perf_counter() < deadline:
            time.sleep(0.05)

    def backend(self) -> str:
        """Since the last time asked."""
        ran, self._ran = " + ".join(sorted(self._ran)), set()
        return ran

    def add(self, name: str, ids: list[int], max_tokens: int, is_sampled: bool) -> None:
        from engine.request import Request, SamplingParams

        sampling = SamplingParams(temperature=1.0 if is_sampled else 0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.submit(Request(name, tuple(ids), len(ids), sampling))

    def step(self) -> tuple[float, list[str]]:
        at, ids = self._queue.get(timeout=120)
        assert all(isinstance(i, str) for i in ids), ids
        return at, ids

    def abort(self, names: list[str]) -> None:
        for name in names:
            self.engine.abort(name)
        while self.engine.stats().num_requests:
            time.sleep(0.01)
        while not self._queue.empty():
            self._queue.get()


class Vllm:
    def __init__(self, path: Path, options: argparse.Namespace):
        os.environ |= dict(
            HF_HUB_OFFLINE="1",
            VLLM_NO_USAGE_STATS="1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_USE_FLASHINFER_SAMPLER="0",
            VLLM_LOGGING_LEVEL="WARNING",
        )
        from vllm import LLM

        self.llm = LLM(
            model=str(path),
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=options.max_model_len,
            gpu_memory_utilization=options.utilization,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_TOKENS,
            dtype="bfloat16",
        )
        self.engine = self.llm.llm_engine
        self.kv_gib = 0.0
        config = getattr(self.engine, "vllm_config", None)
        if config is not None and config.cache_config.num_gpu_blocks:
            text = json.loads((path / "config.json").read_text())
            dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
            per_token = text["num_hidden_layers"] * 2 * text["num_key_value_heads"] * dim * 2
            if text["model_type"] == "gemma2":
                per_token //= 2  # a block is half the layers': those with a window and those without take turns
            self.kv_gib = config.cache_config.num_gpu_blocks * config.cache_config.block_size * per_token / 2**30

    def settle(self) -> None:
        """It is ready when it says so."""

    def backend(self) -> str:
        try:
            runner = self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
            return str(runner.attn_groups[0][0].backend.get_name())
        except (AttributeError, IndexError):  # its insides move between versions
            return "unknown"

    def add(self, name: str, ids: list[int], max_tokens: int, is_sampled: bool) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, temperature=1.0 if is_sampled else 0.0, detokenize=False
        )
        self.engine.add_request(name, {"prompt_token_ids": ids}, sampling)

    def step(self) -> tuple[float, list[str]]:
        while True:
            outputs = self.engine.step()
            if outputs:
                return time.perf_counter(), [o.request_id for o in outputs]

    def abort(self, names: list[str]) -> None:
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()


Driver = Ours | Vllm


def start_batch(driver: Driver, point: Point, lengths: list[int], max_tokens: int) -> list[str]:
    """Adds the rows and steps until all of them have decoded for a while."""
    names = [f"{point.name} {time.perf_counter()} {i}" for i in range(point.batch)]
    for i, (name, length) in enumerate(zip(names, lengths, strict=True)):
        driver.add(name, prompt(length, i), max_tokens, point.kind == "sampled")
    whole = 0
    while whole < 16:
        whole += len(driver.step()[1]) == point.batch
    return names


def decode(driver: Driver, point: Point, windows: int) -> list[float]:
    """Milliseconds of a step, the median of each window; `length` is the context in the middle."""
    num = windows * WINDOW_STEPS
    lengths = [point.length - num // 2 - 16] * point.batch
    if point.kind == "skewed":
        lengths[0] = LONG - num
    names = start_batch(driver, point, lengths, num + 400)
    times: list[float] = []
    while len(times) <= num:
        at, ids = driver.step()
        if len(ids) == point.batch:
            times.append(at)
    driver.abort(names)
    took = [b - a for a, b in pairwise(times)]
    return [statistics.median(took[i : i + WINDOW_STEPS]) * 1e3 for i in range(0, num, WINDOW_STEPS)]


def prefill(driver: Driver, point: Point, rounds: int) -> list[float]:
    """Milliseconds from submission to the last prompt's first token."""
    found = []
    for r in range(rounds):
        names = [f"{point.name} {time.perf_counter()} {i}" for i in range(point.batch)]
        prompts = [prompt(point.length, r * 100 + i) for i in range(point.batch)]
        start = at = time.perf_counter()
        for name, ids in zip(names, prompts, strict=True):
            driver.add(name, ids, 1, False)
        missing = set(names)
        while missing:
            at, got = driver.step()
            missing -= set(got)
        found.append((at - start) * 1e3)
        driver.abort(names)
    return found


def mixed(driver: Driver, point: Point, rounds: int) -> list[float]:
    """Milliseconds of a step that computes a prompt of PROMPT tokens beside the whole decoding batch."""
    steps = (MIXED_PROMPTS + 2) * MIXED_EVERY
    names = start_batch(driver, point, [point.length] * point.batch, (2 * steps + 40) * (rounds + 1))
    first = names[0]

    def run(prompts: int) -> float:
        """Seconds of `steps` steps of the batch, with so many prompts on the way."""
        done = 0
        start = at = 0.0
        while done <= steps:
            at, ids = driver.step()
            if first not in ids:
                continue
            if not done:
                start = at
            if done % MIXED_EVERY == 0 and done // MIXED_EVERY < prompts:
                driver.add(f"extra {time.perf_counter()}", prompt(PROMPT, done), 1, False)
            done += 1
        return at - start

    found = []
    run(2)
    before = run(0)
    for _ in range(rounds):
        together = run(MIXED_PROMPTS)
        after = run(0)
        plain = (before + after) / 2
        found.append(((together - plain) / MIXED_PROMPTS + plain / steps) * 1e3)
        before = after
    driver.abort(names)
    return found


def measure(driver: Driver, point: Point, rounds: int) -> list[float]:
    if point.kind == "prefill":
        return prefill(driver, point, rounds)
    return mixed(driver, point, rounds) if point.kind == "mixed" else decode(driver, point, rounds)


def serve(options: argparse.Namespace) -> None:
    """Until the end of stdin: "kind batchxlength rounds" in, a line "ANSWER {json}" out."""
    started = time.perf_counter()
    kind = Ours if options.serve == "ours" else Vllm
    with no_collections():  # as a worker does
        driver = kind(Path(options.path), options)
    answer(dict(start_s=time.perf_counter() - started, kv_gib=driver.kv_gib))
    driver.settle()
    for line in sys.stdin:
        name, size, rounds = line.split()
        try:
            driver.backend()
            times = measure(driver, Point.parse(name, size), int(rounds))
            answer(dict(ms=times, backend=driver.backend()))
        except Exception as error:
            answer(dict(error=f"{type(error).__name__}: {error}"))
    os._exit(0)


def answer(found: dict[str, Any]) -> None:
    print("ANSWER " + json.dumps(found), flush=True)
