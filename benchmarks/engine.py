"""One engine against transformers on the same threads: decode at batch 1 and 8, prefill of 1k tokens, load time.

Physics: a decode step reads every weight and the batch's KV once, so its floor is those bytes over the memory's copy
bandwidth, measured here; prefill is bound by the matrix products. Our figures are the whole engine's (scheduler,
sampler, its own thread); transformers' are generate with a DynamicCache, less its first token, and a plain forward.
Rounds are interleaved and medians taken, because the machine's other tenants come and go.

    python -m benchmarks.engine --model smollm2 --threads 1
"""

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from cluster.models import resolve
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Event, Request, SamplingParams, Token

GOALS = {"decode_1": 1.0, "decode_8": 3.5, "prefill": 0.95}


class Clock:
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._missing = 0
        self._done = threading.Event()

    def __call__(self, events: list[Event]) -> None:
        now = time.perf_counter()
        for event in events:
            if isinstance(event, Token):
                self.times.append(now)
                self._missing -= event.finish is not None
        if not self._missing:
            self._done.set()

    def run(self, engine: Engine, requests: list[Request]) -> float:
        """Returns when they were submitted; `times` has all their tokens."""
        self.times, self._missing = [], len(requests)
        self._done.clear()
        start = time.perf_counter()
        for request in requests:
            engine.submit(request)
        assert self._done.wait(600), "the engine did not finish"
        return start


class Ours:
    def __init__(self, path: Path, options: argparse.Namespace):
        self.clock = Clock()
        self.num_runs = 0
        config = EngineConfig(
            str(path),
            dtype=options.dtype,
            device=options.device,
            load_format=options.load_format,
            kv_cache_gib=options.kv_cache_gib,
            num_threads=options.threads,
            enable_prefix_caching=False,
            max_num_batched_tokens=max(2048, options.prefill),
        )
        self.engine = Engine(config, self.clock)
        self.engine.start()

    def requests(self, n: int, length: int, max_tokens: int) -> list[Request]:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.num_runs += 1
        vocab = self.engine.model_info.vocab_size
        return [Request(f"{self.num_runs}.{i}", tuple(prompt(length, vocab, i)), length, sampling) for i in range(n)]

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Tokens per second once every sequence is decoding."""
        self.clock.run(self.engine, self.requests(batch, context, steps + 1))
        times = self.clock.times  # the first `batch` come from the prompts
        return (len(times) - batch) / (times[-1] - times[batch - 1])

    def prefill(self, length: int) -> float:
        start = self.clock.run(self.engine, self.requests(1, length, 1))
        return length / (self.clock.times[0] - start)


class Theirs:
    def __init__(self, path: Path, options: argparse.Namespace, dtype: torch.dtype, device: torch.device):
        load = transformers.AutoModelForCausalLM
        if options.load_format == "dummy":
            config = transformers.AutoConfig.from_pretrained(path)
            with torch.device(device):
                self.model = load.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        else:
            self.model = load.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()
        self.device, self.vocab = device, self.model.config.get_text_config().vocab_size

    def ids(self, length: int) -> torch.Tensor:
        return torch.tensor([prompt(length, self.vocab, 0)], device=self.device)

    @torch.inference_mode()
    def decode(self, context: int, steps: int) -> float:
        ids, took = self.ids(context), []
        for new in (1, steps + 1):
            start = time.perf_counter()
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
            took.append(time.perf_counter() - start)
        return steps / (took[1] - took[0])

    @torch.inference_mode()
    def prefill(self, length: int) -> float:
        ids = self.ids(length)
        start = time.perf_counter()
        self.model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).item()
        return length / (time.perf_counter() - start)


def prompt(length: int, vocab: int, seed: int) -> list[int]:
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written per second, of a copy larger than the caches."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best


def median(rounds: int, runs: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Each figure's median over `rounds` interleaved runs, after one to warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            value = run()
            if i:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=128, help="tokens of each decoding prompt")
    parser.add_argument("--steps", type=int, default=24, help="decode steps per round")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the prefill prompt")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = resolve(options.model, print)
    assert transformers.PreTrainedModel  # imported lazily, and for seconds: not part of a model's load time
    ours = Ours(path, options)
    info, layout, device = ours.engine.model_info, ours.engine.layout, ours.engine.slab.device
    theirs = Theirs(path, options, getattr(torch, info.dtype), device)
    c, s, p = options.context, options.steps, options.prefill
    figures = median(
        options.rounds,
        {
            "decode_1": lambda: ours.decode(1, c, s),
            "decode_1_reference": lambda: theirs.decode(c, s),
            "decode_8": lambda: ours.decode(8, c, s),
            "prefill": lambda: ours.prefill(p),
            "prefill_reference": lambda: theirs.prefill(p),
        },
    )
    ours.engine.stop()
    weights = sum(t.numel() * t.element_size() for t in ours.engine.weights())
    per_token = layout.block_bytes // layout.block_size
    bandwidth = copy_bandwidth(device)

    def floor(batch: int) -> float:
        return batch * bandwidth / (weights + batch * (c + s // 2) * per_token)

    rows = [
        ("decode_1", "decode, batch 1", figures["decode_1_reference"], floor(1)),
        ("decode_8", "decode, batch 8", figures["decode_1_reference"], floor(8)),
        ("prefill", f"prefill, {p} tokens", figures["prefill_reference"], None),
    ]
    print(
        f"{info.name} {info.dtype} on {device}, {options.threads} threads, context {c}, {bandwidth / 1e9:.1f} GB/s copy"
    )
    print(f"{'tokens per second':22}{'engine':>10}{'transformers':>14}{'ratio':>8}{'goal':>8}{'floor':>10}")
    result: dict[str, object] = {}
    for name, title, reference, limit in rows:
        ratio = figures[name] / reference
        bound = f"{limit:10.1f}" if limit else f"{'':10}"
        print(f"{title:22}{figures[name]:10.1f}{reference:14.1f}{ratio:8.2f}{GOALS[name]:8.2f}{bound}")
        result[name] = dict(value=figures[name], reference=reference, ratio=ratio, goal=GOALS[name], floor=limit)
    print(f"model load {ours.engine.load_s:.2f} s (goal 2)")
    versions = dict(torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version())
    result |= dict(load_s=ours.engine.load_s, copy_gb_s=bandwidth / 1e9, options=vars(options), versions=versions)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
