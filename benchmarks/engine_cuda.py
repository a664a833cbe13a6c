"""One engine on a GPU against its hardware and, where vLLM is importable, against vLLM: decode, prefill, mixed steps.

Physics: a decode step reads every weight and the batch's KV once, so its floor is those bytes over the measured read
bandwidth; a prefill multiplies every token with every weight, so its floor is those operations over the measured
matrix rate (attention's own operations counted too). Figures are whole engines': schedule, forward, sampling, tokens on
the host. Decode steps are timed one by one while the whole batch decodes; each figure is the median of five medians.
Each engine runs in a process of its own, for two pools do not fit one device, with the same prompts and limits.

    python -m benchmarks.engine_cuda --shapes llama-8b --engines ours vllm
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROPE = dict(rope_type="default", rope_theta=500000.0)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters=ROPE,
        rms_norm_eps=1e-5,
    ),
    "qwen3-8b": dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_parameters=ROPE,
        rms_norm_eps=1e-6,
    ),
    "mistral-7b": dict(
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=4096,
        rope_parameters=ROPE,
        rms_norm_eps=1e-5,
    ),
    "gemma2-9b": dict(
        architectures=["Gemma2ForCausalLM"],
        model_type="gemma2",
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        sliding_window=4096,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        hidden_activation="gelu_pytorch_tanh",
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
}
COMMON = dict(
    max_position_embeddings=65536, tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2
)
DECODE = "1x1024 8x1024 32x1024 64x1024 64x2048 128x1024 256x1024"
PREFILL = "1x512 1x2048 1x8192 4x2048"
MAX_NUM_SEQS, MAX_TOKENS = 256, 8192


@dataclass
class Point:
    """decode: rows of `length` tokens; prefill: prompts; skewed: one row of 32k among them; mixed: a prompt too."""

    kind: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch}x{self.length}"


def points(options: argparse.Namespace) -> list[Point]:
    found = []
    for kind in ("decode", "sampled", "prefill", "skewed", "mixed"):
        for text in (getattr(options, kind) or "").split():
            batch, length = text.split("x")
            found.append(Point(kind, int(batch), int(length)))
    return found


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 30000), k=length)


# ---------------------------------------------------------------- drivers: add requests, step, tell who got a token


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
            gpu_memory_utilization=0.92,
        )
        self.engine = Engine(config, listen, lambda line: print("  ", line, flush=True))
        self.engine.start()
        self.kv_gib = self.engine.slab.numel() / 2**30

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

    def close(self) -> None:
        self.engine.stop()


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
            gpu_memory_utilization=0.92,
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
            self.kv_gib = config.cache_config.num_gpu_blocks * config.cache_config.block_size * per_token / 2**30

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

    def close(self) -> None:
        pass


# ---------------------------------------------------------------- measurements


def decode(driver: Ours | Vllm, point: Point, windows: int = 5, steps: int = 24) -> float:
    """Milliseconds of a step in which every row gets a token; `length` is the context in the middle."""
    num = windows * steps
    lengths = [point.length - num // 2 - 16] * point.batch
    if point.kind == "skewed":
        lengths[0] = 32768 - num
    names = [f"{point.name} {time.perf_counter()} {i}" for i in range(point.batch)]
    for i, (name, length) in enumerate(zip(names, lengths, strict=True)):
        driver.add(name, prompt(length, i), num + 400, point.kind == "sampled")
    times: list[float] = []
    warm = 0
    while len(times) <= num:
        at, ids = driver.step()
        if len(ids) == point.batch:
            warm += 1
            if warm > 16:
                times.append(at)
    driver.abort(names)
    took = [b - a for a, b in pairwise(times)]
    parts = [statistics.median(took[i * steps : (i + 1) * steps]) for i in range(windows)]
    return statistics.median(parts) * 1e3


def prefill(driver: Ours | Vllm, point: Point, rounds: int = 5) -> float:
    """Tokens per second from submission to the last prompt's first token."""
    found = []
    for r in range(rounds + 2):
        names = [f"{point.name} {time.perf_counter()} {i}" for i in range(point.batch)]
        prompts = [prompt(point.length, r * 100 + i) for i in range(point.batch)]
        start = time.perf_counter()
        for name, ids in zip(names, prompts, strict=True):
            driver.add(name, ids, 1, False)
        missing = set(names)
        at = start
        while missing:
            at, got = driver.step()
            missing -= set(got)
        if r >= 2:
            found.append(point.batch * point.length / (at - start))
        driver.abort(names)
    return statistics.median(found)


def mixed(driver: Ours | Vllm, point: Point, rounds: int = 9) -> float:
    """Milliseconds of the step that computes a 512-token prompt beside the whole decoding batch.

    Engines run ahead of their answers, so a long step may show in its neighbour's time: the window of steps from the
    prompt's submission to well past its token, less as many plain steps.
    """
    names = [f"{point.name} {time.perf_counter()} {i}" for i in range(point.batch)]
    for i, name in enumerate(names):
        driver.add(name, prompt(point.length, i), 2000, False)
    warm = 0
    while warm < 20:
        warm += len(driver.step()[1]) == point.batch
    found = []
    for r in range(rounds):
        times = [driver.step()[0] for _ in range(12)]
        plain = statistics.median(b - a for a, b in pairwise(times))
        extra = f"extra {time.perf_counter()}"
        driver.add(extra, prompt(512, 1000 + r), 1, False)
        steps = after = 0
        while after < 6:
            at, ids = driver.step()
            steps += 1
            after += extra in ids or after > 0
        found.append(at - times[-1] - (steps - 1) * plain)
    driver.abort(names)
    return statistics.median(found[2:]) * 1e3


def measure(driver: Ours | Vllm, point: Point) -> float:
    if point.kind == "prefill":
        return prefill(driver, point)
    return mixed(driver, point) if point.kind == "mixed" else decode(driver, point)


# ---------------------------------------------------------------- floors


def ceilings(shape: dict[str, Any]) -> dict[str, float]:
    """Read and copy bandwidth in bytes/s; sustained matrix rate in operations/s at the model's shapes, 8192 rows."""
    import torch

    def timed(call, rounds: int) -> float:
        for _ in range(3):
            call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(rounds):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / rounds / 1e3

    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / timed(lambda: target.copy_(source), 8)
    words = source.view(torch.int64)
    read = source.numel() / timed(lambda: words.max(), 8)
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    dim = shape.get("head_dim") or hidden // shape["num_attention_heads"]
    heads, kv_heads = shape["num_attention_heads"] * dim, shape["num_key_value_heads"] * dim
    took = operations = 0.0
    for n, k in ((heads + 2 * kv_heads, hidden), (hidden, heads), (2 * wide, hidden), (hidden, wide)):
        x = torch.randn(8192, k, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        took += timed(lambda x=x, w=w: torch.nn.functional.linear(x, w), 20)
        operations += 2.0 * 8192 * n * k
    return dict(copy=copied, read=read, matmul=operations / took)


def floor(point: Point, shape: dict[str, Any], limits: dict[str, float]) -> float:
    """The least milliseconds of a step (decode, mixed), or the most tokens per second (prefill)."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    dim = shape.get("head_dim") or hidden // shape["num_attention_heads"]
    heads, kv_heads = shape["num_attention_heads"] * dim, shape["num_key_value_heads"] * dim
    per_layer = hidden * (heads + 2 * kv_heads) + heads * hidden + 3 * hidden * shape["intermediate_size"]
    body, head = layers * per_layer, shape["vocab_size"] * hidden
    bandwidth = max(limits["read"], limits["copy"])
    if point.kind == "prefill":
        operations = 2.0 * body * point.batch * point.length + 2.0 * head * point.batch
        operations += point.batch * layers * 2.0 * point.length**2 * heads  # causal: half of q k and half of p v
        return point.batch * point.length / (operations / limits["matmul"])
    tokens = point.batch * point.length + (32768 - point.length) * (point.kind == "skewed")
    window = shape.get("sliding_window") or 10**9
    windowed = 0.5 if shape["model_type"] == "gemma2" else 1.0 if shape["model_type"] == "mistral" else 0.0
    read = min(point.length, window) * windowed + point.length * (1 - windowed)
    read = tokens if point.kind == "skewed" else point.batch * read
    seconds = ((body + head) * 2 + read * layers * 4 * kv_heads) / bandwidth
    if point.kind == "mixed":
        seconds = max(seconds, 2.0 * body * (512 + point.batch) / limits["matmul"])
    return seconds * 1e3


# ---------------------------------------------------------------- processes


def child(options: argparse.Namespace) -> None:
    """One engine over one shape; prints a line per figure."""
    started = time.perf_counter()
    driver = (Ours if options.child == "ours" else Vllm)(Path(options.path), options)
    result = {"start_s": time.perf_counter() - started, "kv_gib": driver.kv_gib}
    print(f"  {options.child}: ready in {result['start_s']:.1f} s, {driver.kv_gib:.1f} GiB of KV", flush=True)
    for point in points(options):
        try:
            result[point.name] = measure(driver, point)
            print(f"  {options.child}: {point.name} {result[point.name]:.3f}", flush=True)
        except Exception as error:
            print(f"  {options.child}: {point.name} failed: {type(error).__name__}: {error}", flush=True)
    driver.close()
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)


def parent(options: argparse.Namespace) -> None:
    everything: dict[str, Any] = {}
    for name in options.shapes:
        shape = COMMON | SHAPES[name]
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(shape))
            found = {engine: spawn(engine, folder, options) for engine in options.engines}
        limits = json.loads(run([sys.executable, "-m", "benchmarks.engine_cuda", "--ceilings", name])[-1])
        print(
            f"\n{name} bf16: read {limits['read'] / 1e12:.2f} TB/s, copy {limits['copy'] / 1e12:.2f} TB/s, "
            f"matmul {limits['matmul'] / 1e12:.0f} TFLOP/s"
        )
        print(f"{'':22}{'floor':>9}" + "".join(f"{e:>10}" for e in options.engines) + f"{'of floor':>10}{'of vLLM':>9}")
        for point in points(options):
            least = floor(point, shape, limits)
            values = [found[e].get(point.name) for e in options.engines]
            ratio = share = ""
            if values[0]:
                share = f"{values[0] / least:.3f}"
            if len(values) > 1 and values[0] and values[1]:
                ratio = f"{values[0] / values[1]:.3f}"
            cells = "".join(f"{v:10.2f}" if v else f"{'-':>10}" for v in values)
            print(f"{point.name:22}{least:9.2f}{cells}{share:>10}{ratio:>9}")
        everything[name] = dict(limits=limits, **found)
    print(json.dumps(everything))


def spawn(engine: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.engine_cuda", "--child", engine, "--path", folder]
    for kind in ("decode", "sampled", "prefill", "skewed", "mixed"):
        command += [f"--{kind}", getattr(options, kind) or ""]
    command += ["--max-model-len", str(options.max_model_len)]
    lines = run(command, shown=True)
    results = [line[7:] for line in lines if line.startswith("RESULT ")]
    return json.loads(results[-1]) if results else {}


def run(command: list[str], shown: bool = False) -> list[str]:
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if shown and not line.startswith("RESULT "):
                print(line, end="", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["llama-8b"], choices=SHAPES)
    parser.add_argument("--engines", nargs="+", default=["ours"], choices=["ours", "vllm"])
    parser.add_argument("--decode", default=DECODE, help="batch x context, several in one argument")
    parser.add_argument("--sampled", default="", help="the same at temperature 1")
    parser.add_argument("--prefill", default=PREFILL)
    parser.add_argument("--skewed", default="", help="decode with the first row at 32k tokens")
    parser.add_argument("--mixed", default="", help="decodes, and a prompt of 512 tokens beside them")
    parser.add_argument("--max-model-len", type=int, default=9000)
    parser.add_argument("--child", choices=["ours", "vllm"], help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ceilings:
        print(json.dumps(ceilings(COMMON | SHAPES[options.ceilings])))
    elif options.child:
        child(options)
    else:
        parent(options)


if __name__ == "__main__":
    main()
