"""A small gRPC client of the public API, for `generate`, `chat` and the demo."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from cluster.models import cache_dir
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

_CONNECT_S = 5.0
_KNOWN_S = 0.5
_UNLIMITED = [("grpc.max_receive_message_length", -1)]


class ClientError(RuntimeError):
    """A call ended with a status other than OK; one line with its code and details."""


@dataclass(slots=True)
class Answer:
    """What a finished stream said, and when it said it on this side's clock."""

    text: str = ""
    num_tokens: int = 0
    ttft_s: float = 0.0
    duration_s: float = 0.0
    timings: pb.Timings = field(default_factory=pb.Timings)
    usage: pb.Usage = field(default_factory=pb.Usage)

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first."""
        return (self.duration_s - self.ttft_s) / max(1, self.num_tokens - 1)


class Client:
    """One channel to one router. A context manager."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=_UNLIMITED)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def connect(self, within_s: float = _CONNECT_S) -> None:
        try:
            grpc.channel_ready_future(self._channel).result(within_s)
        except grpc.FutureTimeoutError:
            raise ClientError(f"no router answers at {self.address}") from None

    def stream(self, request: pb.GenerateRequest, deadline_s: float, answer: Answer) -> Iterator[str]:
        """Yields text of sequence 0 as it arrives and fills `answer`. Leaving early cancels the call. ClientError."""
        started = time.perf_counter()
        call = self._stub.GenerateStream(request, timeout=deadline_s)
        try:
            for message in call:
                now = time.perf_counter() - started
                if message.delta.num_tokens and message.delta.index == 0:
                    answer.ttft_s = answer.ttft_s or now
                    answer.duration_s = now
                    answer.num_tokens += message.delta.num_tokens
                    answer.text += message.delta.text
                    yield message.delta.text
                elif message.delta.text:  # held back until the sequence's end
                    answer.text += message.delta.text
                    yield message.delta.text
                if message.HasField("timings"):
                    answer.timings = message.timings
                    answer.usage = message.usage
        except grpc.RpcError as error:
            raise ClientError(_one_line(error)) from None
        finally:
            call.cancel()

    def server_info(self) -> pb.GetServerInfoResponse:
        try:
            return self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=_CONNECT_S)
        except grpc.RpcError as error:
            raise ClientError(_one_line(error)) from None


def chat_request(messages: list[tuple[str, str]], sampling: pb.SamplingParams, max_tokens: int) -> pb.GenerateRequest:
    """`messages` as (role, content); 0 tokens: as many as fit."""
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages])
    return pb.GenerateRequest(chat=chat, sampling=sampling, stopping=_stopping(max_tokens))


def text_request(prompt: str, sampling: pb.SamplingParams, max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=prompt, sampling=sampling, stopping=_stopping(max_tokens))


def summary(answer: Answer) -> str:
    """One line: tokens, times, workers, KV moved."""
    timings = answer.timings
    moved = "no KV moved"
    if timings.kv_transfer_bytes:
        moved = f"{timings.kv_transfer_bytes / 2**20:.2f} MiB of KV over {timings.kv_transport}"
    workers = timings.prefill_worker
    if timings.decode_worker:
        workers += f" -> {timings.decode_worker}"
    return (
        f"{answer.num_tokens} tokens, TTFT {answer.ttft_s * 1e3:.0f} ms, TPOT {answer.tpot_s * 1e3:.0f} ms, "
        f"{workers}, {moved}"
    )


# The router's address of a deployment that `up` brought up here, so that asking it something needs no Ray.


def remember_address(deployment: str, address: str) -> None:
    path = _address_file(deployment)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(address)


def forget_address(deployment: str) -> None:
    _address_file(deployment).unlink(missing_ok=True)


def remembered_address(deployment: str) -> str:
    """Empty if there is none, or nothing answers there."""
    try:
        address = _address_file(deployment).read_text().strip()
        with Client(address) as client:
            client.connect(_KNOWN_S)
    except (OSError, ClientError):
        return ""
    return address


def _address_file(deployment: str) -> Path:
    return cache_dir() / "routers" / deployment


def _stopping(max_tokens: int) -> pb.StoppingCriteria:
    return pb.StoppingCriteria(max_tokens=max_tokens or None)


def _one_line(error: grpc.RpcError) -> str:
    code = error.code().name  # type: ignore[attr-defined]
    return f"{code}: {' '.join((error.details() or '').split())}"  # type: ignore[attr-defined]
