"""The controller on two Ray nodes of one machine, with fakes for workers: placement, scaling, deaths, adoption."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from cluster import launch
from cluster.config import DeploymentConfig
from cluster.controller import remember
from cluster.launch import Deployment, LaunchError, parts
from protos import worker_pb2
from tests.fake_cluster import FAKES


def settings(**changes: Any) -> DeploymentConfig:
    pools: dict[str, Any] = {
        "prefill": {"label_selector": {"pool": "prefill"}, **changes.pop("prefill", {})},
        "decode": {"label_selector": {"pool": "decode"}, **changes.pop("decode", {})},
    }
    model = {"path": changes.pop("model", "fake")}
    return DeploymentConfig.model_validate({"model": model, "pools": pools, "router": {"port": 0}, **changes})


@contextmanager
def deployed(config: DeploymentConfig, wait: bool = True) -> Iterator[Deployment]:
    """Up, then down, and no process of it is left."""
    deployment = launch.up(config, print, wait=wait, builders=FAKES)
    pids: set[int] = set()
    try:
        yield deployment
        pids = {part["pid"] for part in parts(deployment.status()) if part["pid"]}
    finally:
        deployment.down()
    assert not {pid for pid in pids if psutil.pid_exists(pid)}
    assert not launch.is_up(config.name)


def until(deployment: Deployment, holds: Callable[[dict[str, Any]], bool], within_s: float = 20.0) -> dict[str, Any]:
    deadline = time.monotonic() + within_s
    for status in deployment.changes():
        if holds(status):
            return status
        assert time.monotonic() < deadline, status
    raise AssertionError


def workers(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {worker["id"]: worker for pool in status["pools"].values() for worker in pool["workers"]}


def test_up_places_by_label_and_tells_everybody(two_nodes: Cluster) -> None:
    labels = {node["NodeID"]: node["Labels"].get("pool") for node in ray.nodes()}
    with deployed(settings(prefill={"replicas": 2})) as deployment:
        status = deployment.status()
        there = workers(status)
        assert set(there) == {"prefill-0", "prefill-1", "decode-0"}
        assert {i: labels[w["node"]] for i, w in there.items()} == {
            "prefill-0": "prefill",
            "prefill-1": "prefill",
            "decode-0": "decode",
        }
        everybody = {i: worker["incarnation"] for i, worker in there.items()}
        assert all(worker["report"]["members"] == everybody for worker in there.values())
        assert set(status["router"]["report"]["history"][-1]) == set(there)
        assert status["router"]["address"].startswith("127.0.0.1:")
        assert status["router"]["report"]["frozen"] > 10_000  # what collections need not walk


def test_pools_scale_apart_and_drain_first(two_nodes: Cluster) -> None:
    with deployed(settings(model="fake,decode:busy")) as deployment:
        deployment.scale({"prefill": 2, "decode": 3})
        status = until(deployment, launch.is_settled)
        assert set(workers(status)) == {"prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"}

        deployment.scale({"decode": 1})
        draining = until(deployment, lambda s: any(w["state"] == "draining" for w in workers(s).values()))
        assert workers(draining)["decode-0"]["state"] == "ready"
        status = until(deployment, launch.is_settled)
        assert set(workers(status)) == {"prefill-0", "prefill-1", "decode-0"}
        told = [members.get("decode-2") for members in status["router"]["report"]["history"]]
        told = [state for k, state in enumerate(told) if k == 0 or state != told[k - 1]]
        assert told == [None, worker_pb2.WORKER_STATE_READY, worker_pb2.WORKER_STATE_DRAINING, None]
        assert all("decode-2" not in worker["report"]["members"] for worker in workers(status).values())

        deployment.drain("prefill-0")
        status = deployment.status()
        assert set(workers(status)) == {"prefill-1", "decode-0"}
        assert status["pools"]["prefill"]["target"] == 1


def test_wrong_wishes_are_refused(two_nodes: Cluster) -> None:
    with deployed(settings()) as deployment:
        with pytest.raises(LaunchError, match="at least one prefill and one decode worker"):
            deployment.scale({"decode": 0})
        with pytest.raises(LaunchError, match=r"decod=2: unknown pool"):
            deployment.scale({"decod": 2})
        with pytest.raises(LaunchError, match=r"prefill=-1: allowed is \[0, 1024\]"):
            deployment.scale({"prefill": -1})
        with pytest.raises(LaunchError, match="which has prefill-0, decode-0"):
            deployment.drain("decode-7")
        with pytest.raises(LaunchError, match="at least one prefill"):
            deployment.drain("decode-0")
        with pytest.raises(LaunchError, match="up already"):
            launch.up(settings(), print, builders=FAKES)
        assert launch.is_settled(deployment.status())


def test_a_killed_worker_is_replaced(two_nodes: Cluster) -> None:
    with deployed(settings()) as deployment:
        before = workers(deployment.status())["decode-0"]
        os.kill(before["pid"], signal.SIGKILL)
        killed = time.monotonic()
        status = until(deployment, lambda s: workers(s)["decode-0"]["state"] != "ready")
        assert time.monotonic() - killed < 2.0
        status = until(deployment, launch.is_settled)
        after = workers(status)["decode-0"]
        assert after["restarts"] == 1 and after["pid"] != before["pid"]
        assert after["incarnation"] != before["incarnation"]
        assert "died" in after["last_error"]
        peer = workers(deployment.status())["prefill-0"]
        assert peer["report"]["members"]["decode-0"] == after["incarnation"]
        told = [members.get("decode-0") for members in status["router"]["report"]["history"]]
        told = told[told.index(worker_pb2.WORKER_STATE_STARTING) :]
        assert set(told) == {worker_pb2.WORKER_STATE_STARTING, worker_pb2.WORKER_STATE_READY}


def test_a_killed_router_comes_back_at_its_address(two_nodes: Cluster) -> None:
    with deployed(settings()) as deployment:
        before = deployment.status()["router"]
        os.kill(before["pid"], signal.SIGKILL)
        status = until(deployment, lambda s: s["router"]["restarts"] == 1 and launch.is_settled(s))
        assert status["router"]["address"] == before["address"]
        everybody = {"prefill-0", "decode-0"}  # it is told right after it is ready
        until(deployment, lambda s: [set(told) for told in s["router"]["report"]["history"]][-1:] == [everybody])


def test_an_engine_without_a_heartbeat_is_replaced(two_nodes: Cluster) -> None:
    with deployed(settings()) as deployment:
        pid = workers(deployment.status())["prefill-0"]["pid"]
        mark = f"/tmp/pdserve-fake-unhealthy-{pid}"
        open(mark, "w").close()
        try:
            status = until(deployment, lambda s: workers(s)["prefill-0"]["restarts"] == 1 and launch.is_settled(s))
        finally:
            os.unlink(mark)
        assert workers(status)["prefill-0"]["last_error"] == "the engine gives no sign of life"


def test_a_writer_that_does_not_fence_is_ended(two_nodes: Cluster) -> None:
    """Stopped, it answers nobody, Ray included: its node sees to its end, and who waited for it hears so."""
    with deployed(settings(model="fake,decode:waits", fence_timeout_s=1.0)) as deployment:
        before = workers(deployment.status())["prefill-0"]
        os.kill(before["pid"], signal.SIGSTOP)
        status = until(deployment, lambda s: workers(s)["decode-0"]["report"].get("ended"), within_s=40.0)
        assert not psutil.pid_exists(before["pid"])
        assert workers(status)["decode-0"]["report"]["ended"] == [("prefill-0", before["incarnation"])]
        status = until(deployment, launch.is_settled)
        after = workers(status)["prefill-0"]
        assert after["restarts"] == 1 and "had not ended after 1 s" in after["last_error"]
        assert status["controller"]["writers_killed"] == 1 and after["incarnation"] != before["incarnation"]


def test_a_restarted_controller_adopts_what_lives(two_nodes: Cluster) -> None:
    with deployed(settings()) as deployment:
        deployment.scale({"decode": 2})
        before = until(deployment, launch.is_settled)
        os.kill(before["controller"]["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 20.0
        while True:
            try:
                after = deployment.status()
                break
            except LaunchError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert after["controller"]["pid"] != before["controller"]["pid"]
        after = until(deployment, launch.is_settled)
        assert {i: w["pid"] for i, w in workers(after).items()} == {i: w["pid"] for i, w in workers(before).items()}
        assert after["router"]["pid"] == before["router"]["pid"]
        assert after["pools"]["decode"]["target"] == 2
        os.kill(workers(after)["decode-1"]["pid"], signal.SIGKILL)
        until(deployment, lambda s: workers(s)["decode-1"]["restarts"] == 1 and launch.is_settled(s))


def test_up_starts_from_its_settings_whatever_an_earlier_deployment_left(two_nodes: Cluster) -> None:
    remember("default", {"prefill": 1, "decode": 3, "colocated": 0})
    with deployed(settings()) as deployment:
        assert set(workers(deployment.status())) == {"prefill-0", "decode-0"}


def test_idle_gpus_are_told_of(two_nodes: Cluster) -> None:
    said: list[str] = []
    launch.tell_idle_gpus(settings(), said.append)
    assert said == []
    node = two_nodes.add_node(num_cpus=1, num_gpus=2)
    try:
        two_nodes.wait_for_nodes()
        launch.tell_idle_gpus(settings(decode={"num_gpus": 1}), said.append)
        assert said == []
        launch.tell_idle_gpus(settings(), said.append)
        assert len(said) == 1 and said[0].startswith("2 GPUs are idle, and the workers will run on CPUs")
        assert "pools.prefill.num_gpus=1" in said[0]
    finally:
        two_nodes.remove_node(node)


def test_a_worker_that_cannot_start_says_why_and_nothing_is_left(two_nodes: Cluster) -> None:
    with pytest.raises(LaunchError, match="decode-0 did not start: num_blocks is 1; the model needs at least 8"):
        launch.up(settings(model="fake,decode:fail"), print, builders=FAKES)
    assert not launch.is_up("default")


def test_a_pending_worker_says_what_it_waits_for(two_nodes: Cluster) -> None:
    nowhere = settings(
        prefill={"replicas": 2, "resources": {"prefill_slots": 2}}, decode={"label_selector": {"a": "b"}}
    )
    with deployed(nowhere, wait=False) as deployment:
        status = until(
            deployment, lambda s: sorted(w["state"] for w in workers(s).values()) == ["placing", "placing", "ready"]
        )
        waiting = {i: w["detail"] for i, w in workers(status).items() if w["state"] == "placing"}
        assert waiting.pop("decode-0") == "waits for a node with label a=b: none of 3 nodes has a label a"
        assert list(waiting.values()) == ["waits for 2 prefill_slots: in use, 1 of 3 free"]
    short = settings(decode={"num_gpus": 1}, placement_timeout_s=0.5)
    with pytest.raises(LaunchError, match=r"decode-0 found no place .* 1 GPU on one node: .*pool=decode has none"):
        launch.up(short, print, builders=FAKES)
    assert not launch.is_up("default")
