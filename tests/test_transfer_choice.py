"""Which transport a pair of workers takes, and why."""

import grpc.aio
import pytest

from kv_transfer import create, locality
from kv_transfer.base import Endpoint, TransferRefused
from kv_transfer.choose import candidates
from kv_transfer.create import Transports
from kv_transfer.receiver import Receiver
from tests.transfer import make_memory

HERE = {"local": "process", "cuda_ipc": "host", "grpc": ""}
MISSING = {"nixl": "not installed"}


def names(setting: str, *endpoints: Endpoint) -> tuple[list[str], list[str]]:
    chosen, left_out = candidates(setting, HERE, MISSING, endpoints)
    return [endpoint.transport for endpoint in chosen], left_out


def test_auto_takes_the_nearest():
    every = [Endpoint("grpc"), Endpoint("nixl"), Endpoint("cuda_ipc", "host"), Endpoint("local", "process")]
    assert names("auto", *every) == (["local", "cuda_ipc", "grpc"], ["nixl: not installed"])


def test_what_is_too_far_away_is_left_out_and_named():
    far = [Endpoint("grpc"), Endpoint("cuda_ipc", "another host"), Endpoint("local", "another process")]
    chosen, left_out = names("auto", *far)
    assert chosen == ["grpc"]
    assert left_out == [
        "local: the workers are different processes",
        "cuda_ipc: the workers are on different hosts",
        "nixl: not installed",
    ]


def test_a_named_transport_is_taken_or_none():
    assert names("grpc", Endpoint("grpc"), Endpoint("local", "process")) == (["grpc"], [])
    assert names("cuda_ipc", Endpoint("grpc")) == ([], ["cuda_ipc: the receiver has none"])
    with pytest.raises(ValueError, match="transport 'pigeon': must be one of auto, local, cuda_ipc, nixl, grpc, ray"):
        names("pigeon")


def test_a_process_knows_itself_and_its_dead():
    me = locality.process()
    assert not locality.is_gone(me)
    scope, pid, started = me.rsplit(":", 2)
    assert locality.is_gone(f"{scope}:{pid}:{int(started) - 1}")  # an older process had this pid
    assert not locality.is_gone(f"another boot/pid:[1]:{pid}:{started}")  # cannot be told from here
    assert not locality.is_gone("")


def transports_of(setting: str) -> Transports:
    return Transports(setting, Receiver(make_memory(2), 1 << 20), ("worker", "1"))


async def test_a_transport_that_cannot_be_offered_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def export(transport: str, *_: object) -> bytes:
        if transport == "local":
            raise RuntimeError("PassManager::run failed\nand so on")
        return b""

    monkeypatch.setattr(create, "_export", export)
    transports = transports_of("auto")
    transports.serve(grpc.aio.server(), "127.0.0.1:1")
    assert [endpoint.transport for endpoint in transports.endpoints] == ["grpc"] == list(transports.speaks)
    assert transports.missing["local"] == "it cannot be offered: RuntimeError: PassManager::run failed"
    await transports.close()
    with pytest.raises(ValueError, match="transport 'local': it cannot be offered"):
        transports_of("local").serve(grpc.aio.server(), "127.0.0.1:1")


async def test_a_transport_that_fails_at_the_handshake_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    class Broken:
        async def connect(self, address: str, endpoint: Endpoint) -> None:
            raise RuntimeError("CUDA driver error: out of memory")

        async def close(self) -> None:
            pass

    own = create.create_sender
    monkeypatch.setattr(
        create,
        "create_sender",
        lambda name, *args, **options: Broken() if name == "local" else own(name, *args, **options),
    )
    transports = transports_of("auto")
    offered = [Endpoint("local", locality.process()), Endpoint("grpc")]
    connection = await transports.connect("127.0.0.1:1", offered, 0)
    assert connection.link.transport == "grpc"
    assert "local: RuntimeError: CUDA driver error: out of memory" in connection.why
    with pytest.raises(TransferRefused, match=r"no transport leads to .* local: RuntimeError: CUDA"):
        await transports.connect("127.0.0.1:1", offered[:1], 0)
    await transports.close()
