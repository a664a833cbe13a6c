"""The load client: traces as their formats say, results from recorded times, a run against stub workers."""

import json
from pathlib import Path

import pytest

from benchmarks import serving, traces
from benchmarks.traces import Arrival
from tests.router_front import routed


def test_azure(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.1805900,9,1\n"
    )
    assert traces.read("azure", path) == [Arrival(0.0, 374, 44), Arrival(0.5, 9, 1)]


def test_mooncake_prompts_share_prefixes(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 3500, "input_length": 1500, "output_length": 6, "hash_ids": [0, 1, 7]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = traces.read("mooncake", path)
    assert (first.at_s, second.at_s) == (0.0, 2.5)
    one, two = (traces.prompt_ids(a, 49152, seed=3, number=i) for i, a in enumerate((first, second)))
    assert (len(one), len(two)) == (1100, 1500)
    assert one[:1024] == two[:1024] and one[1024:1100] != two[1024:1100]


def test_sharegpt_needs_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.csv"
    path.write_text("prompt_tokens,output_tokens,conversation_messages\n33,256,12\n17,73,2\n")
    with pytest.raises(ValueError, match="needs a rate"):
        traces.read("sharegpt", path)
    first, second = traces.read("sharegpt", path, rate=2.0, seed=1)
    assert (first.prompt_tokens, second.output_tokens) == (33, 73) and second.at_s > 0
    with pytest.raises(ValueError, match="is not a azure trace"):
        traces.read("azure", path)


def test_poisson_and_window() -> None:
    arrivals = traces.poisson(50, 20, 8, 4, seed=1)
    assert 850 < len(arrivals) < 1150 and arrivals == traces.poisson(50, 20, 8, 4, seed=1)
    faster = traces.window(arrivals, speedup=4, duration_s=2.5, limit=100)
    assert len(faster) == 100 and faster[10].at_s == arrivals[10].at_s / 4


async def test_a_run_counts_everything(smollm2: Path) -> None:
    async with routed(smollm2) as front:
        front.cluster.workers["d0"].faults.step_s = 0.01
        arrivals = [*traces.poisson(40, 0.5, 16, 8, seed=2), Arrival(0.5, 9000, 1)]
        results = await serving.run(front.router.address, arrivals)
        summary = serving.summarize(results, slo_ttft_ms=2000, slo_tpot_ms=500)
        assert summary["finished"] == summary["requests"] == len(arrivals)
        assert summary["cut_prompts"] == 1 and summary["errors"] == {}
        assert [r.num_tokens for r in results] == [8] * (len(arrivals) - 1) + [1]
        assert summary["slo_attainment"] == 1.0 and 5 < summary["tpot_ms"]["p50"] < 100
        assert serving.summarize(results, slo_ttft_ms=0)["goodput_per_s"] == 0
        json.dumps(summary, allow_nan=False)
        serving.show(summary)


async def test_errors_are_counted_by_reason(smollm2: Path) -> None:
    async with routed(smollm2, decode=0) as front:
        results = await serving.run(front.router.address, traces.poisson(40, 0.2, 16, 8, seed=2))
        summary = serving.summarize(results)
        assert summary["errors"] == {"NO_HEALTHY_WORKER": len(results)} and summary["finished"] == 0
        json.dumps(summary, allow_nan=False)
        serving.show(summary)
