"""How far loading is: said by the engine a few times, shown as bars on a terminal and as few lines in a log."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

import cluster.starting
import engine.progress
from cluster.starting import Starting
from engine.config import EngineConfig
from engine.engine import Engine


def said(model: Path, **config) -> list[str]:
    lines: list[str] = []
    Engine(EngineConfig(str(model), num_blocks=8, device="cpu", **config), lambda events: None, lines.append)
    return lines


def test_the_share_of_tensors_read_grows(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.progress, "SAY_EVERY_S", 0.0)
    lines = [line for line in said(llama) if line.startswith("reading")]
    found = [re.fullmatch(r"reading weights (\d+)% \((\d+) of (\d+) tensors, 1 MB\) \.\.\.", line) for line in lines]
    assert all(found), lines
    shares = [int(one[1]) for one in found if one]
    assert shares == sorted(shares) and shares[0] == 0 and 90 < shares[-1] < 100
    assert [int(one[2]) for one in found if one] == list(range(int(found[0][3])))  # type: ignore[index]


def test_random_weights_are_counted(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.progress, "SAY_EVERY_S", 0.0)
    monkeypatch.setattr(engine.progress, "_size", str)
    lines = [line for line in said(llama, load_format="dummy") if line.startswith("making")]
    sizes = [int(line.removeprefix("making random weights: ").removesuffix(" ...")) for line in lines]
    assert sizes == sorted(sizes) and sizes[-1] == 4 * (
        2 * 131 * 64 + 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 128) + 64
    )


def test_it_is_said_a_few_times_a_second(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(i * 0.03 for i in range(10**6))
    monkeypatch.setattr(engine.progress.time, "monotonic", lambda: next(clock))
    lines = [line for line in said(llama) if line.startswith("reading")]
    assert 3 < len(lines) < 10  # of 40 tensors, 0.03 s each


LINES = [
    "decode-0     starting",
    "decode-0     loading   reading weights 5% (1 of 20 tensors, 3 MB) ...",
    "prefill-0    loading   reading weights 9% (2 of 20 tensors, 3 MB) ...",
    "decode-0     loading   reading weights 40% (8 of 20 tensors, 3 MB) ...",
    "decode-0     loading   m: [5M] parameters in 0.3 s",
    "decode-0     ready",
]


def shown(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(cluster.starting.time, "monotonic", lambda: next(clock))
    file = io.StringIO()
    with Starting(Console(file=file, force_terminal=terminal, width=120, color_system=None), "coming up") as say:
        for line in LINES:
            say(line)
            say._progress.refresh()
    return file.getvalue()


def test_a_log_has_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(False, monkeypatch).splitlines() == [LINES[i] for i in (0, 1, 2, 4, 5)]


def test_a_terminal_has_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    output = shown(True, monkeypatch)
    assert "decode-0 reading weights 40% (8 of 20 tensors, 3 MB) ━━" in output
    assert "prefill-0 reading weights 9%" in output and "..." not in output
    kept = [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).splitlines()]
    assert all(LINES[i] in kept for i in (0, 4, 5))
