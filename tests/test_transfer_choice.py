"""Which transport a pair of workers takes, and why."""

import pytest

from kv_transfer import locality
from kv_transfer.base import Endpoint
from kv_transfer.choose import candidates

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
