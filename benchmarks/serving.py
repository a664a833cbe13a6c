"""How a running service answers an open-loop load: TTFT, TPOT, ITL, throughput, goodput, errors by reason.

    python -m benchmarks.serving --target HOST:PORT --rate 2 --prompt-tokens 512 --output-tokens 64 --duration-s 30
    python -m benchmarks.serving --target HOST:PORT --trace azure FILE --speedup 4 --slo-ttft-ms 500 --slo-tpot-ms 50

Open loop: a request starts when its arrival says, whether or not earlier ones have been answered; what waits, waits in
the service and counts. Everything is computed from the recorded times of receipt:

    TTFT   first token received - request sent
    TPOT   (last token - first token) / (tokens - 1), per request
    ITL    the gaps between consecutive messages with tokens, pooled
    goodput  requests per second that finished within both SLOs

Prompts are random token ids; those of a mooncake trace share prefixes as the trace's blocks say. Prompts that do not
fit the served context are cut, and counted as cut. Nothing can beat the model: the ceiling of TPOT is a decode step's
time, that of TTFT the prompt's prefill at the machine's matmul rate.
"""

import argparse
import asyncio
import json
import platform
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from benchmarks import traces
from benchmarks.stats import percentile, table
from benchmarks.traces import Arrival
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1))


@dataclass(slots=True)
class Result:
    """One request's times, in seconds from the start of the run. `error` is an ErrorInfo reason, "" if it finished."""

    arrival: Arrival
    sent_s: float
    was_cut: bool = False
    received_s: list[float] = field(default_factory=list)  # of each message with tokens
    num_tokens: int = 0
    end_s: float = 0.0
    error: str = ""
    timings: pb.Timings | None = None

    @property
    def ttft_s(self) -> float:
        return self.received_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """None for a single token."""
        return (self.received_s[-1] - self.received_s[0]) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    def meets(self, ttft_ms: float | None, tpot_ms: float | None) -> bool:
        if self.error or not self.received_s:
            return False
        tpot_s = self.tpot_s
        return (ttft_ms is None or self.ttft_s * 1e3 <= ttft_ms) and (
            tpot_ms is None or tpot_s is None or tpot_s * 1e3 <= tpot_ms
        )


async def run(target: str, arrivals: Sequence[Arrival], seed: int = 0, timeout_s: float = 600.0) -> list[Result]:
    """Sends `arrivals` to the service at `target` and waits for all answers. Results are in order of arrival."""
    async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        model = (await stub.ListModels(pb.ListModelsRequest(), timeout=30)).models[0]
        requests = [_request(arrival, model, seed, i) for i, arrival in enumerate(arrivals)]
        start = time.monotonic()
        running = []
        for arrival, request in zip(arrivals, requests, strict=True):
            await asyncio.sleep(max(0.0, start + arrival.at_s - time.monotonic()))
            running.append(asyncio.create_task(_generate(stub, arrival, request, start, timeout_s)))
        return list(await asyncio.gather(*running))


def summarize(
    results: Sequence[Result], slo_ttft_ms: float | None = None, slo_tpot_ms: float | None = None
) -> dict[str, Any]:
    """Plain numbers, ms and per second, of everything that `run` recorded."""
    done = [r for r in results if not r.error and r.received_s]
    span_s = max((r.end_s for r in results), default=0.0) - min((r.sent_s for r in results), default=0.0)
    gaps = [1e3 * (b - a) for r in done for a, b in zip(r.received_s, r.received_s[1:], strict=False)]
    lateness = [1e3 * (r.sent_s - r.arrival.at_s) for r in results]
    moved = [r.timings.kv_transfer_bytes for r in done if r.timings is not None]
    return {
        "requests": len(results),
        "finished": len(done),
        "cut_prompts": sum(r.was_cut for r in results),
        "errors": dict(Counter(r.error for r in results if r.error)),
        "span_s": span_s,
        "requests_per_s": len(done) / span_s if span_s else 0.0,
        "prompt_tokens_per_s": sum(r.arrival.prompt_tokens for r in done) / span_s if span_s else 0.0,
        "output_tokens_per_s": sum(r.num_tokens for r in done) / span_s if span_s else 0.0,
        "goodput_per_s": sum(r.meets(slo_ttft_ms, slo_tpot_ms) for r in done) / span_s if span_s else 0.0,
        "slo_attainment": sum(r.meets(slo_ttft_ms, slo_tpot_ms) for r in done) / len(results) if results else 0.0,
        "slo_ttft_ms": slo_ttft_ms,
        "slo_tpot_ms": slo_tpot_ms,
        "ttft_ms": _spread([1e3 * r.ttft_s for r in done]),
        "tpot_ms": _spread([1e3 * r.tpot_s for r in done if r.tpot_s is not None]),
        "itl_ms": _spread(gaps),
        "kv_bytes_moved": sum(moved),
        "local_prefills": sum(r.timings.local_prefill for r in done if r.timings is not None),
        "retries": sum(r.timings.retries for r in done if r.timings is not None),
        "late_start_p99_ms": percentile(lateness, 99),  # the client's own fault: distrust the run if large
    }


def show(summary: dict[str, Any]) -> None:
    """The table for people."""
    rows = [[name[:-3].upper() + " ms", *(summary[name][k] for k in ("p50", "p90", "p99", "max"))] for name in _SPREADS]
    print(table(["", "P50", "P90", "P99", "max"], rows))
    print(
        f"{summary['finished']} of {summary['requests']} requests finished in {summary['span_s']:.1f} s:"
        f" {summary['requests_per_s']:.2f} requests/s, {summary['output_tokens_per_s']:.1f} output tokens/s,"
        f" goodput {summary['goodput_per_s']:.2f} requests/s ({summary['slo_attainment']:.0%} within SLO)"
    )
    if summary["errors"]:
        print("errors: " + ", ".join(f"{reason} {count}" for reason, count in sorted(summary["errors"].items())))
    if summary["cut_prompts"]:
        print(f"{summary['cut_prompts']} prompts were cut to the served context")


def main() -> None:
    options = _parser().parse_args()
    arrivals = load(options)
    if not arrivals:
        raise SystemExit("no requests: the rate, the duration or the trace leaves none")
    results = asyncio.run(run(options.target, arrivals, options.seed, options.timeout_s))
    summary = summarize(results, options.slo_ttft_ms, options.slo_tpot_ms)
    show(summary)
    versions = {"python": platform.python_version(), "grpcio": grpc.__version__}
    print(json.dumps({"benchmark": "serving", "config": vars(options), **versions, **summary}))


def load(options: argparse.Namespace) -> list[Arrival]:
    """The arrivals that the command line asks for."""
    if options.trace is None:
        return traces.poisson(
            options.rate, options.duration_s, options.prompt_tokens, options.output_tokens, options.seed
        )[: options.requests]
    kind, path = options.trace
    found = traces.read(kind, Path(path), options.rate, options.seed)
    return traces.window(found, options.speedup, options.duration_s, options.requests)


_SPREADS = ("ttft_ms", "tpot_ms", "itl_ms")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, metavar="HOST:PORT")
    parser.add_argument("--trace", nargs=2, metavar=("KIND", "FILE"), help=f"KIND is one of {', '.join(traces.KINDS)}")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second (Poisson; sharegpt too)")
    parser.add_argument("--duration-s", type=float, default=30.0)
    parser.add_argument("--requests", type=int, default=None, help="at most so many")
    parser.add_argument("--speedup", type=float, default=1.0, help="of a trace's clock")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--slo-ttft-ms", type=float, default=None)
    parser.add_argument("--slo-tpot-ms", type=float, default=None)
    parser.add_argument("--timeout-s", type=float, default=600.0, help="each request's deadline")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _request(arrival: Arrival, model: pb.ModelInfo, seed: int, number: int) -> pb.GenerateRequest:
    ids = traces.prompt_ids(arrival, model.vocab_size, seed, number)[: model.max_model_len - 1]
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingParams(temperature=1.0, seed=random.Random(f"{seed}/{number}").getrandbits(63)),
        stopping=pb.StoppingCriteria(
            max_tokens=min(arrival.output_tokens, model.max_model_len - len(ids)), ignore_eos=True
        ),
    )


async def _generate(stub: Any, arrival: Arrival, request: pb.GenerateRequest, start: float, timeout_s: float) -> Result:
    result = Result(arrival, time.monotonic() - start)
    result.was_cut = len(request.token_ids.ids) < arrival.prompt_tokens
    try:
        async for message in stub.GenerateStream(request, timeout=timeout_s):
            if message.delta.num_tokens:
                result.received_s.append(time.monotonic() - start)
                result.num_tokens += message.delta.num_tokens
            if message.HasField("timings"):
                result.timings = message.timings
    except grpc.aio.AioRpcError as error:
        result.error = reason_of(error)
    result.end_s = time.monotonic() - start
    return result


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """ErrorInfo's reason, or the status code's name where there is none."""
    status = rpc_status.from_call(error)
    for box in status.details if status is not None else ():
        if box.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            return error_details_pb2.ErrorInfo.FromString(box.value).reason
    return error.code().name


def _spread(values: Sequence[float]) -> dict[str, float]:
    """None of these is JSON's NaN: without values all are 0."""
    if not values:
        return {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0, "mean": 0.0}
    spread = {f"p{p}": percentile(values, p) for p in (50, 90, 99)}
    return {**spread, "max": max(values), "mean": sum(values) / len(values)}


if __name__ == "__main__":
    main()
