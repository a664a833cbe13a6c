"""The command from its shell: helps, refusals in one line, and a whole deployment from `up` to `down`."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import typer

from cluster import cli, doctor, launch
from cluster.doctor import Finding


class Shell:
    """Runs `pdserve` with a cache and a Ray of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        gone = ("RAY_ADDRESS", "PDSERVE_CACHE")
        self.environment = {key: value for key, value in os.environ.items() if key not in gone}
        self.environment |= {"PDSERVE_CACHE": str(home), "RAY_TMPDIR": str(home), "NO_COLOR": "1", "COLUMNS": "200"}

    def __call__(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Its output, both streams, after checking the exit status. A traceback is always a failure."""
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        assert "Traceback" not in output
        return output


@pytest.fixture
def pdserve(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.mark.parametrize(
    "command", ["up", "down", "status", "scale", "drain", "generate", "chat", "doctor", "config", "config schema"]
)
def test_help(pdserve: Shell, command: str) -> None:
    assert "Usage:" in pdserve(*command.split(), "--help")


def test_help_says_what_drain_does_to_the_pool(pdserve: Shell) -> None:
    assert "size falls by one" in pdserve("drain", "--help")


def test_config_schema_and_show(pdserve: Shell, tmp_path: Path) -> None:
    schema = json.loads(pdserve("config", "schema"))
    assert {"model", "pools", "router", "transport"} <= set(schema["properties"])
    path = tmp_path / "pd.yaml"
    path.write_text(pdserve("config", "show", "--set", "pools.decode.replicas=3"))
    assert "replicas: 3" in pdserve("config", "show", "-f", str(path))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "up --set pools.decode.replica=2",
            "error: pools.decode.replica: unknown key; did you mean pools.decode.repli",
        ),
        ("up -f absent.yaml", "error: absent.yaml: No such file or directory"),
        ("status", "error: no Ray cluster: set RAY_ADDRESS, or start one with `pdserve up`"),
        ("down", "error: no Ray cluster"),
        ("chat hello", "error: no Ray cluster"),
        ("scale decode", "error: decode: must be POOL=N, such as decode=3"),
        ("generate hello --address 127.0.0.1:1", "error: no router answers at 127.0.0.1:1"),
    ],
)
def test_errors_are_one_line(pdserve: Shell, command: str, says: str) -> None:
    output = pdserve(*command.split(), code=1)
    assert output.startswith(says) and output.count("\n") == 1


def test_a_wrong_ray_address_is_one_line(pdserve: Shell) -> None:
    assert pdserve("up", code=1, RAY_ADDRESS="127.0.0.1:1").startswith("error: no Ray cluster answers at 127.0.0.1:1: ")


def test_brackets_in_what_workers_say_are_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "device [/cuda:0] is not in [1, 2] at 10.0.0.1:100: [red]x"
    findings = [Finding("KV [a] -> b", True, said), Finding("[/b]", False, said)]
    monkeypatch.setattr(cli, "_deployment", lambda name: None)
    monkeypatch.setattr(doctor, "examine", lambda deployment, blocks: findings)
    cli._say(f"decode-0 failed {said}")
    with pytest.raises(typer.Exit):
        cli.doctor()
    assert capsys.readouterr().out.splitlines() == [
        f"decode-0 failed {said}",
        f"ok   KV [a] -> b : {said}",
        f"FAIL [/b] : {said}",
    ]


def test_a_call_that_ray_never_answers_is_given_up() -> None:
    with pytest.raises(launch.Unreachable, match=r"did not answer within 0\.1 s; is its head alive"):
        launch.answered(threading.Event().wait, 0.1)
    assert launch.answered(lambda: 7) == 7


HEAD = """
import ray, sys, time
ray.init(address="local", include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False, num_cpus=1)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


def test_ctrl_c_ends_up_when_the_head_hangs(pdserve: Shell, tiny: Path) -> None:
    environment = pdserve.environment | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": "/tmp"}  # short, for its sockets
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert head.stdout is not None and head.stdin is not None
    address = head.stdout.readline().strip()
    (gcs,) = [p for p in psutil.Process(head.pid).children(recursive=True) if "gcs_server" in p.name()]
    command = [sys.executable, "-m", "cluster.cli", "up", "--model", str(tiny), "--load-format", "dummy"]
    up = subprocess.Popen(
        command,
        env=environment | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background job starts with SIGINT ignored, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert up.stdout is not None and "joined the Ray cluster" in up.stdout.readline()
        gcs.suspend()
        time.sleep(1.0)
        up.send_signal(signal.SIGINT)
        assert up.wait(40) == 130  # at once, or after the cluster was asked in vain to clean up
    finally:
        up.kill()
        up.wait()
        gcs.resume()
        head.stdin.close()
        head.wait(60)


@pytest.fixture
def leaves_nothing(pdserve: Shell) -> Iterator[None]:
    """Whatever the test does, `down` at its end leaves no process of its Ray cluster."""
    try:
        yield
    finally:
        keeper_file = pdserve.home / "local-ray.json"
        family = []
        if keeper_file.exists():
            keeper = psutil.Process(json.loads(keeper_file.read_text())["pid"])
            family = [keeper, *keeper.children(recursive=True)]
            pdserve("down")
        assert not [process for process in family if process.is_running() and process.status() != "zombie"]
        assert not keeper_file.exists()


@pytest.mark.usefixtures("leaves_nothing")
def test_a_deployment_from_up_to_down(pdserve: Shell, tiny: Path) -> None:
    settings = ["--model", str(tiny), "--load-format", "dummy", "--set", "router.port=0"]
    for pool in ("prefill", "decode"):
        settings += ["--set", f"pools.{pool}.num_blocks=64", "--set", f"pools.{pool}.num_threads=1"]
    output = pdserve("up", *settings)
    assert "starting a local one" in output and "prefill-0    ready" in output

    status = json.loads(pdserve("status", "--json"))
    workers = {worker["id"]: worker for pool in status["pools"].values() for worker in pool["workers"]}
    assert {worker["state"] for worker in workers.values()} == {"ready"}
    assert workers["decode-0"]["report"]["total_blocks"] == 64
    assert status["router"]["address"] in output
    listening = [
        connection.laddr.ip
        for process in psutil.Process(json.loads((pdserve.home / "local-ray.json").read_text())["pid"]).children(True)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}

    answer = pdserve("generate", "Once upon a time", "--max-tokens", "5", "--temperature", "0")
    assert "5 tokens, TTFT" in answer and "prefill-0 -> decode-0" in answer and "of KV over grpc" in answer
    assert "tokens, TTFT" in pdserve("chat", "Hello", "--max-tokens", "3", "--no-timings", "--timings")

    assert "decode 2 after" in pdserve("scale", "decode=2")
    assert "decode-0 is gone" in pdserve("drain", "decode-0")
    findings = pdserve("doctor", "--blocks", "4").splitlines()
    assert all(line.startswith("ok") for line in findings)
    assert any("KV prefill-0 -> decode-1" in line and "GB/s, verified" in line for line in findings)
    assert "decode-1" in pdserve("status")

    assert "is up already" in pdserve("up", *settings, code=1)
    assert "tokens, TTFT" in pdserve("generate", "Still", "--max-tokens", "2")
    output = pdserve("down")
    assert "deployment 'default' is down" in output and "the local Ray cluster is stopped" in output
    assert "no Ray cluster" in pdserve("status", code=1)


@pytest.mark.usefixtures("leaves_nothing")
def test_up_that_fails_says_why_and_cleans_up(pdserve: Shell, tiny: Path) -> None:
    settings = ["--model", str(tiny), "--set", "router.port=0"]  # it has no weights
    output = pdserve("up", *settings, code=1)
    assert "did not start: UnsupportedModel: " in output and "no *.safetensors" in output
    assert "the local Ray cluster is stopped" in output

    nowhere = [
        "--load-format",
        "dummy",
        "--set",
        "pools.decode.label_selector.rack=7",
        "--set",
        "placement_timeout_s=1",
    ]
    output = pdserve("up", *settings, *nowhere, code=1)
    assert "error: decode-0 found no place within 1 s: waits for a node with label rack=7" in output
    assert "the local Ray cluster is stopped" in output
    assert "no such model directory" in pdserve("up", "--model", "/nowhere", code=1)
