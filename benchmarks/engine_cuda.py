"""One engine on a GPU against its hardware and, where vLLM is importable, against vLLM: decode, prefill, mixed steps.

Physics: a decode step reads every weight and the batch's KV once, so its floor is those bytes over the measured read
bandwidth; a prefill multiplies every token with every weight, so its floor is those operations over the sustained
matrix rate (attention's own counted too). The floor is the larger of the two times. Figures are whole engines':
schedule, forward, sampling, tokens on the host.

Each engine runs in a process of its own, with the same prompts and limits. `--share` keeps both on the
device, each on half the memory, and alternates them round by round; points whose KV does not fit there follow one
engine after the other at 0.92 of the memory, which is also where start-up and KV capacity are read.

    python -m benchmarks.engine_cuda --engines ours vllm --prefill "1x2048 1x8192" --decode 64x1024 --mixed 64x1024
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engine_cuda_shapes import SHAPES, Point, Shape

KINDS = ("decode", "sampled", "skewed", "mixed", "prefill")
DECODE = "1x1024 8x1024 32x1024 64x1024 64x2048 128x1024 256x1024"
PREFILL = "1x512 1x2048 1x8192 4x2048"
ALONE, SHARED = 0.92, 0.46  # of the device's memory, each
ROUNDS = 5


class Process:
    """An engine that answers."""

    def __init__(self, engine: str, folder: str, options: argparse.Namespace, utilization: float, kv_gib: float = 0):
        """`kv_gib`: so much KV in place of what `utilization` gives."""
        self.engine = engine
        command = [sys.executable, "-m", "benchmarks.engine_cuda", "--serve", engine, "--path", folder]
        command += ["--utilization", str(utilization), "--kv-gib", str(kv_gib)]
        command += ["--max-model-len", str(options.max_model_len)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready: dict[str, Any] = {}

    def wait(self) -> bool:
        """Whether it started."""
        self.ready = self._answer()
        say(f"{self.engine}: {self.ready}")
        return "error" not in self.ready

    def ask(self, point: Point, rounds: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(point.kind, f"{point.batch}x{point.length}", rounds, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return dict(error="has ended")
        found = self._answer()
        text = " ".join(f"{ms:.3f}" for ms in found.get("ms", [])) or found.get("error")
        say(f"{self.engine}: {point.name} {text}")
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line[7:])
        return dict(error=f"ended with {self._process.wait()}")


def say(line: str) -> None:
    print("  ", line, flush=True)


def points(options: argparse.Namespace) -> list[Point]:
    return [Point.parse(kind, text) for kind in KINDS for text in (getattr(options, kind) or "").split()]


def together(shape: Shape, folder: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The engines alternate: a round of one, a round of the other. The last of them starts first, on its share of the
    memory; the others get as much KV as it found room for."""
    ready: list[Process] = []
    kv_gib = 0.0
    for name in reversed(options.engines):
        engine = Process(name, folder, options, SHARED, kv_gib)
        if engine.wait():
            ready.insert(0, engine)
            kv_gib = engine.ready["kv_gib"]
    found: dict[str, dict[str, Any]] = {engine.engine: dict(**engine.ready, points={}) for engine in ready}
    fitting = [point for point in points(options) if point.num_tokens * shape.kv_bytes <= kv_gib * 2**30]
    for point in fitting:
        if point.kind in ("prefill", "mixed"):  # plans, caches, clocks; a batch that decodes has warmed up by itself
            for engine in ready:
                engine.ask(point, 2 if point.kind == "prefill" else 1)
        for _ in range(options.rounds):
            for engine in ready:
                add(found[engine.engine]["points"], point, engine.ask(point, 1))
    for engine in ready:
        engine.close()
    if rest := [point for point in points(options) if point not in fitting]:
        for name, alone in in_turn(folder, options, rest).items():
            shared = found.setdefault(name, {}).get("points", {})
            found[name] = alone | dict(points=shared | alone["points"])
    return found


def in_turn(folder: str, options: argparse.Namespace, wanted: list[Point]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in options.engines:
        engine = Process(name, folder, options, ALONE)
        if engine.wait():
            found[name] = dict(**engine.ready, points={})
            for point in wanted:
                if point.kind == "prefill":
                    engine.ask(point, 2)
                add(found[name]["points"], point, engine.ask(point, options.rounds))
        engine.close()
    return found


def add(to: dict[str, Any], point: Point, answer: dict[str, Any]) -> None:
    mine = to.setdefault(point.name, dict(ms=[], backend=answer.get("backend", "")))
    mine["ms"] += answer.get("ms", [])


def table(name: str, options: argparse.Namespace, found: dict[str, Any], limits: dict[str, float]) -> None:
    shape = Shape(name)
    print(
        f"\n{name} bf16: read {limits['read'] / 1e12:.2f} TB/s, copy {limits['copy'] / 1e12:.2f} TB/s, matmul "
        f"{limits['matmul'] / 1e12:.0f} TFLOP/s sustained, {limits['burst'] / 1e12:.0f} at first"
    )
    head = "".join(f"{text:>10}" for text in ("floor ms", *options.engines, "of floor", "of vLLM", "tokens/s"))
    print(f"{'':20}{head}{'MBU':>7}{'MFU':>7}  attention")
    for point in points(options):
        cost = shape.cost(point)
        least = max(cost.operations / limits["matmul"], cost.size_bytes / limits["read"]) * 1e3
        values = {}
        for engine in options.engines:
            times = found.get(engine, {}).get("points", {}).get(point.name, {}).get("ms")
            values[engine] = statistics.median(times) if times else None
        cells = [f"{least:.2f}", *(f"{v:.2f}" if v else "-" for v in values.values())]
        first = values[options.engines[0]]
        mine = found.get(options.engines[0], {}).get("points", {}).get(point.name, {})
        if first:
            other = values.get("vllm")
            num_tokens = point.batch * (point.length if point.kind == "prefill" else 1)
            cells += [
                f"{first / least:.3f}",
                f"{first / other:.3f}" if other else "-",
                f"{num_tokens / first * 1e3:.0f}",
            ]
            mbu, mfu = cost.size_bytes / limits["read"] / first * 1e3, cost.operations / limits["matmul"] / first * 1e3
            shares = f"{mbu:>7.3f}{mfu:>7.3f}"
            if cost.skipped:
                shares += f" ({(cost.operations - cost.skipped) / limits['matmul'] / first * 1e3:.3f} computed)"
            backends = [found.get(e, {}).get("points", {}).get(point.name, {}).get("backend", "") for e in values]
            shares += "  " + " | ".join(backends)
            mine["tokens_s"], mine["mbu"], mine["mfu"] = num_tokens / first * 1e3, mbu, mfu
        else:
            shares = ""
        print(f"{point.name:20}" + "".join(f"{cell:>10}" for cell in cells) + shares)


def parent(options: argparse.Namespace) -> None:
    everything: dict[str, Any] = dict(machine=platform.machine(), python=platform.python_version())
    for name in options.shapes:
        shape = Shape(name)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(shape.config))
            found = together(shape, folder, options) if options.share else in_turn(folder, options, points(options))
        floors = json.loads(output([sys.executable, "-m", "benchmarks.engine_cuda", "--floors", name]))
        if options.per_op:
            print(f"\n{'operation':20}{'rows':>6}{'us':>10}{'floor us':>10}{'ratio':>8}{'TB/s':>8}{'TFLOP/s':>9}")
            for op in floors["operations"]:
                print(
                    f"{op['op']:20}{op['rows']:>6}{op['us']:>10.1f}{op['floor_us']:>10.1f}{op['ratio']:>8.2f}"
                    f"{op['tb_s']:>8.2f}{op['tflop_s']:>9.0f}"
                )
        table(name, options, found, floors["limits"])
        everything[name] = dict(**floors, **found)
    print(json.dumps(everything))


def floors(name: str) -> None:
    import torch

    from benchmarks.engine_cuda_floors import ceilings, operations

    shape = Shape(name)
    with torch.inference_mode():
        limits = ceilings(shape)
        torch.cuda.empty_cache()
        found = operations(shape, limits)
    versions = dict(torch=torch.__version__, device=torch.cuda.get_device_name())
    print(json.dumps(dict(limits=limits, operations=found, **versions)))


def output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["llama-8b"], choices=SHAPES)
    parser.add_argument("--engines", nargs="+", default=["ours"], choices=["ours", "vllm"])
    parser.add_argument("--decode", default=DECODE, help="batch x context, several in one argument")
    parser.add_argument("--sampled", default="", help="the same at temperature 1")
    parser.add_argument("--skewed", default="", help="decode with the first row at 32k tokens")
    parser.add_argument("--mixed", default="", help="decodes, and prompts of 512 tokens beside them")
    parser.add_argument("--prefill", default=PREFILL)
    parser.add_argument("--share", action="store_true", help="both engines at once, alternating, on half the memory")
    parser.add_argument("--per-op", action="store_true", help="print each operation against its floor")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--max-model-len", type=int, default=9000)
    parser.add_argument("--serve", choices=["ours", "vllm"], help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    parser.add_argument("--utilization", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--kv-gib", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--floors", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.floors:
        floors(options.floors)
    elif options.serve:
        from benchmarks.engine_cuda_drivers import serve

        serve(options)
    else:
        parent(options)


if __name__ == "__main__":
    main()
