"""The `pdserve` command. Each command says what it did or, in one line, why it could not."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from cluster.config import DeploymentConfig
    from cluster.launch import Deployment

app = typer.Typer(
    help="Disaggregated prefill/decode LLM inference on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="What can be configured, and what is.", no_args_is_help=True)
app.add_typer(config_app, name="config")

# Emoji off: an address such as 1.2.3.4:100:... must stay what it is.
_out = Console(highlight=False, soft_wrap=True, emoji=False)
_err = Console(highlight=False, soft_wrap=True, emoji=False, stderr=True)

_INTERRUPTED = 130  # exit status of a command ended by Ctrl-C

Name = Annotated[str, typer.Option("--name", "-n", help="Which deployment, where a Ray cluster holds several.")]
File = Annotated[Path | None, typer.Option("--file", "-f", help="Settings in YAML; see `pdserve config schema`.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key=value on top of the file, such as pools.decode.replicas=2.")
]
Address = Annotated[str, typer.Option(help="The router's host:port; default: that of the deployment.")]
MaxTokens = Annotated[int, typer.Option(min=0, help="Tokens to generate; 0: until the model ends.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own.")]
Seed = Annotated[int | None, typer.Option(help="Equal seeds give equal tokens.")]
Deadline = Annotated[float, typer.Option("--timeout", help="Seconds until the request is given up.")]
Timings = Annotated[bool, typer.Option("--timings/--no-timings", help="A line about times, workers and KV moved.")]


def main() -> None:
    """The console script. Known failures end as one line on stderr and exit status 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what `up` has begun is cleaned up
    try:
        app()
    except Exception as error:
        if not isinstance(error, known_errors()):
            raise
        _err.print(f"[red]error:[/red] {escape(str(error))}")
        _leave(1)
    except KeyboardInterrupt:
        _leave(_INTERRUPTED)
    except SystemExit as end:  # Typer's own way to say the same
        if end.code == _INTERRUPTED:
            _leave(_INTERRUPTED)
        raise


def _leave(status: int) -> None:
    """Without Ray's own clean-up at exit, which waits for a head that may be dead, deaf to Ctrl-C."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@app.command()
def up(
    file: File = None,
    overrides: Overrides = None,
    model: Annotated[str, typer.Option(help="Directory, hub id or 'smollm2'; same as --set model.path=...")] = "",
    load_format: Annotated[str, typer.Option(help="'dummy': random weights from config.json alone.")] = "",
    name: Annotated[str, typer.Option("--name", "-n", help="The deployment's name; same as --set name=...")] = "",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when all workers are ready.")] = True,
) -> None:
    """Start a deployment.

    Joins RAY_ADDRESS or a running Ray cluster, and starts a local one only if there is none. Fails with a worker's own
    error if it cannot start, or with what a worker waits for, and then leaves nothing behind.
    """
    from cluster import client, launch
    from cluster.starting import Starting

    config = _load(file, overrides, model=model, load_format=load_format, name=name)
    _warn_if_public(config)
    launch.connect(_say, start=True, transport=config.transport)
    try:
        with Starting(_out, f"bringing up {config.model.name}") as say:
            deployment = launch.up(config, say, wait)
    except BaseException:
        launch.stop_local_ray(_say)
        raise
    if wait:
        address = deployment.status()["router"]["address"]
        client.remember_address(config.name, address)
        hint = f"{config.model.name} at {address}; try `pdserve chat 'Hello'`, `pdserve status`"
        _out.print(f"[green]ready[/green]: {escape(hint)}")
    else:
        _say("starting; see `pdserve status --watch`")


@app.command()
def down(name: Name = "default") -> None:
    """End a deployment, and the local Ray cluster if `up` started it."""
    from cluster import client, launch

    client.forget_address(name)
    launch.down(name, _say)


@app.command()
def status(
    name: Name = "default",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; with --watch one line per change.")] = False,
) -> None:
    """Show pools, workers and the router."""
    from rich.live import Live

    from cluster.show import status_view

    deployment = _deployment(name)
    if as_json:
        for current in deployment.changes():
            print(json.dumps(current, indent=None if watch else 2), flush=True)
            if not watch:
                return
    elif not watch:
        _wide(_out).print(status_view(deployment.status()))
    else:
        with Live(console=_wide(_out), auto_refresh=False) as live:
            for current in deployment.changes():
                live.update(status_view(current), refresh=True)


@app.command()
def scale(
    sizes: Annotated[list[str], typer.Argument(metavar="POOL=N...", help="Such as prefill=2 decode=3.")],
    name: Name = "default",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when the pools have their new sizes.")] = True,
) -> None:
    """Change the pools' sizes while requests run.

    New workers take work once they are ready. Surplus workers take nothing new, finish what they have, then stop.
    """
    from cluster.launch import LaunchError

    targets = {}
    for size in sizes:
        pool, _, count = size.partition("=")
        if not count.isdecimal():
            raise LaunchError(f"{size}: must be POOL=N, such as decode=3")
        targets[pool] = int(count)
    deployment = _deployment(name)
    deployment.scale(targets)
    if wait:
        _follow(deployment)


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="Its id, as `pdserve status` shows it.")], name: Name = "default"
) -> None:
    """Take one worker away: nothing new, finish what it has, stop. Its pool's size falls by one.

    Use `pdserve scale` afterwards to put another one in its place.
    """
    deployment = _deployment(name)
    with _out.status(escape(f"draining {worker}")):
        deployment.drain(worker)
    _say(f"{worker} is gone")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Raw text for the model to go on with.")],
    name: Name = "default",
    address: Address = "",
    max_tokens: MaxTokens = 64,
    temperature: Temperature = None,
    seed: Seed = None,
    timeout: Deadline = 300.0,
    timings: Timings = True,
) -> None:
    """Complete a text, printing tokens as they arrive."""
    from cluster import client
    from protos.inference_pb2 import SamplingParams

    request = client.text_request(prompt, SamplingParams(temperature=temperature, seed=seed), max_tokens)
    with client.Client(_router_address(name, address)) as connection:
        connection.connect()
        _print_answer(connection, request, timeout, timings)


@app.command()
def chat(
    message: Annotated[str, typer.Argument(help="One question; without it, a conversation until Ctrl-D.")] = "",
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    name: Name = "default",
    address: Address = "",
    max_tokens: MaxTokens = 0,
    temperature: Temperature = None,
    seed: Seed = None,
    timeout: Deadline = 300.0,
    timings: Timings = True,
) -> None:
    """Talk to the model through its chat template."""
    from cluster import client
    from protos.inference_pb2 import SamplingParams

    sampling = SamplingParams(temperature=temperature, seed=seed)
    messages = [("system", system)] if system else []
    with client.Client(_router_address(name, address)) as connection:
        connection.connect()
        for question in [message] if message else _questions():
            messages.append(("user", question))
            request = client.chat_request(messages, sampling, max_tokens)
            messages.append(("assistant", _print_answer(connection, request, timeout, timings)))


@app.command()
def doctor(
    name: Name = "default",
    blocks: Annotated[int, typer.Option(min=1, help="KV blocks to send between each pair of workers.")] = 32,
) -> None:
    """Check the deployment: processes, versions, and the KV path of every worker pair with test data."""
    from cluster.doctor import examine

    failed = 0
    for finding in examine(_deployment(name), blocks):
        mark = "[green]ok  [/green]" if finding.ok else "[red]FAIL[/red]"
        _out.print(mark, escape(f"{finding.what} : {finding.said}"))
        failed += not finding.ok
    if failed:
        raise typer.Exit(1)


@config_app.command()
def schema() -> None:
    """Print every key with its type, default and range, as JSON Schema."""
    from cluster.config import DeploymentConfig

    print(json.dumps(DeploymentConfig.model_json_schema(), indent=2))


@config_app.command()
def show(file: File = None, overrides: Overrides = None) -> None:
    """Print the settings that `up` would use, defaults included, as YAML."""
    import yaml

    print(yaml.safe_dump(_load(file, overrides).model_dump(), sort_keys=False), end="")


def _load(file: Path | None, overrides: list[str] | None, **shortcuts: str) -> "DeploymentConfig":
    from cluster.config_file import load

    keys = {"model": "model.path", "load_format": "model.load_format", "name": "name"}
    return load(file, [*(overrides or []), *(f"{keys[key]}={value}" for key, value in shortcuts.items() if value)])


def _deployment(name: str) -> "Deployment":
    from cluster import launch

    launch.connect(_quiet)
    return launch.Deployment(name)


def _router_address(name: str, address: str) -> str:
    from cluster import client
    from cluster.launch import LaunchError

    address = address or client.remembered_address(name)
    if not address:
        address = _deployment(name).status()["router"]["address"]
    if not address:
        raise LaunchError(f"the router of {name!r} is not up; see `pdserve status`")
    return address


def _print_answer(connection: Any, request: Any, timeout: float, timings: bool) -> str:
    from cluster.client import Answer, summary

    answer = Answer()
    for text in connection.stream(request, timeout, answer):
        print(text, end="", flush=True)
    print()
    if timings:
        _err.print(f"[dim]{escape(summary(answer))}[/dim]")
    return answer.text


def _questions() -> Iterator[str]:
    while True:
        try:
            question = _out.input("[bold]you>[/bold] ").strip()
        except EOFError:
            print()
            return
        if question:
            yield question


def _follow(deployment: "Deployment") -> None:
    """Prints what changes until the pools have their sizes. LaunchError if a worker cannot start."""
    from cluster.launch import LaunchError, is_settled, parts
    from cluster.starting import Starting

    seen: dict[str, tuple[str, str]] = {part["id"]: ("ready", "") for part in parts(deployment.status())}
    started = time.monotonic()
    with Starting(_out, "scaling") as say:
        for status in deployment.changes():
            now = {part["id"]: (part["state"], part["detail"]) for part in parts(status)}
            for worker, (state, detail) in now.items():
                if seen.get(worker) != (state, detail):
                    say(f"{worker:<12} {state:<9} {detail}".rstrip())
                if state == "failed":
                    raise LaunchError(f"{worker} did not start: {detail}; it is tried again until you scale back")
            for worker in seen.keys() - now.keys():
                say(f"{worker:<12} gone")
            seen = now
            if is_settled(status):
                break
    sizes = ", ".join(f"{pool} {state['ready']}" for pool, state in status["pools"].items() if state["target"])
    _say(f"{sizes} after {time.monotonic() - started:.1f} s")


def _warn_if_public(config: "DeploymentConfig") -> None:
    if config.router.host not in ("127.0.0.1", "localhost", "::1"):
        _err.print(
            f"[bold yellow]WARNING: the router listens on {escape(config.router.host)} without authentication: "
            "whoever reaches it can use the model[/bold yellow]"
        )


def _say(line: str) -> None:
    """A line as it is: errors of workers may hold brackets, which are no markup."""
    _out.print(line, markup=False)


def _quiet(line: str) -> None:
    """For commands whose output is for programs too."""


def _wide(console: Console) -> Console:
    """A table piped into a file is not cut at 80 columns."""
    return console if console.is_terminal else Console(highlight=False, width=200)


def known_errors() -> tuple[type[BaseException], ...]:
    """Imported only when something has failed, since they pull in Ray and gRPC."""
    from cluster.client import ClientError
    from cluster.config_file import ConfigError
    from cluster.launch import LaunchError
    from cluster.local_ray import LocalRayError
    from cluster.models import ModelNotFound

    return (ClientError, ConfigError, LaunchError, LocalRayError, ModelNotFound)


if __name__ == "__main__":
    main()
