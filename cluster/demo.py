"""`make demo`: a real model behind one prefill and one decode worker on this machine, asked a few things over gRPC.

What it does is what `pdserve up`, `chat` and `down` do; nothing here is special to the demo but the prompts.
"""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cluster import launch
from cluster.cli import known_errors
from cluster.client import Answer, Client, chat_request, summary
from cluster.config_file import load
from cluster.models import DEMO_MODEL
from cluster.starting import Starting
from protos.inference_pb2 import GenerateRequest, SamplingParams

CHAT = "Explain in three sentences why the sky is blue."
PROMPTS = (
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
    "What is the capital of France?",
    "Give me a tip for learning to cook.",
)
MAX_TOKENS = 64
DEADLINE_S = 120.0

_out = Console(highlight=False, soft_wrap=True)


def main(
    model: Annotated[str, typer.Option(help="Directory or hub id.")] = DEMO_MODEL,
    load_format: Annotated[str, typer.Option(help="'dummy': random weights.")] = "auto",
) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing stays behind
    started = time.monotonic()
    overrides = ["name=demo", f"model.path={model}", f"model.load_format={load_format}", "router.port=0"]
    try:
        config = load(None, overrides)
        launch.connect(_say, start=True, transport=config.transport, join_running=False)
        try:
            with Starting(_out, "bringing up one prefill and one decode worker") as say:
                deployment = launch.up(config, say)
            try:
                _ask(deployment.status()["router"]["address"])
            finally:
                _out.rule("everything down")
                deployment.down()
        finally:
            launch.stop_local_ray(_say, but=config.name)
    except known_errors() as error:
        _out.print(f"[red]error:[/red] {escape(str(error))}")
        raise typer.Exit(1) from None
    _say(f"the demo took {time.monotonic() - started:.0f} s")


def _ask(address: str) -> None:
    greedy = SamplingParams(temperature=0)
    with Client(address) as client:
        _out.rule("one chat, streamed as it arrives")
        _say(f"[bold]{CHAT}[/bold]")
        answer = Answer()
        for text in client.stream(chat_request([("user", CHAT)], greedy, MAX_TOKENS), DEADLINE_S, answer):
            _out.out(text, end="")
        _say(f"\n[dim]{summary(answer)}[/dim]")

        _out.rule(f"{len(PROMPTS)} prompts at once")
        requests = [chat_request([("user", prompt)], greedy, MAX_TOKENS) for prompt in PROMPTS]
        answers = together(client, requests)
    for prompt, one in zip(PROMPTS, answers, strict=True):
        _say(f"[bold]{prompt}[/bold]\n{escape(one.text.strip())}\n[dim]{summary(one)}[/dim]")


def together(client: Client, requests: Sequence[GenerateRequest]) -> list[Answer]:
    """All requests at the same moment; answers in their order. ClientError of the first that failed."""
    gate = threading.Barrier(len(requests))

    def one(request: GenerateRequest) -> Answer:
        answer = Answer()
        gate.wait()
        for _ in client.stream(request, DEADLINE_S, answer):
            pass
        return answer

    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(one, requests))


_say: Callable[[str], None] = _out.print

if __name__ == "__main__":
    typer.run(main)
