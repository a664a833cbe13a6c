"""Connecting to Ray, and what `pdserve up` and `down` do there. Everything an operator can ask of a deployment."""

import contextlib
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import psutil
import ray
from ray._private.authentication import authentication_token_setup
from ray.exceptions import GetTimeoutError, RayError

from cluster import local_ray
from cluster.actors import CONTROLLER
from cluster.config import ROLES, DeploymentConfig, namespace
from cluster.controller import Controller, forget
from cluster.models import resolve
from cluster.spec import Builders
from cluster.supervisor import explain

_CALL_S = 30.0
_DOWN_S = 60.0
_POLL_S = 1.0
_GONE_S = 10.0
_JOIN_S = 60.0
_ANSWER_S = 30.0
_PROBE_S = 5.0
Say = Callable[[str], None]
T = TypeVar("T")


class LaunchError(RuntimeError):
    """What the operator asked for cannot be done; one line that says why."""


class Unreachable(LaunchError):
    """The Ray cluster does not answer, so that nothing can be done in it, cleaning up included."""


def connect(say: Say, start: bool = False, transport: str = "grpc", join_running: bool = True) -> None:
    """Joins RAY_ADDRESS, else the cluster that `up` started, else a running one, else (`start`) starts a local one.

    `join_running=False` leaves clusters of others alone, unless RAY_ADDRESS names one.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS", "")
    if address and address != "auto":
        _join(address)
        say(f"joined the Ray cluster at {address} (RAY_ADDRESS)")
    elif local := local_ray.running():
        _join_local(local)
        say(f"joined the local Ray cluster at {local.address}, started by an earlier `pdserve up`")
    elif join_running and (address := _running_cluster()):
        _use_rays_token()
        _join(address)
        say(f"joined the running Ray cluster at {address}")
    elif start:
        say("no Ray cluster is running: starting a local one")
        local = local_ray.start(_object_store_bytes(transport), transport == "ray_store")
        try:
            _join_local(local)
        except LaunchError:
            local_ray.stop(local)
            raise
        say(f"started a local Ray cluster at {local.address}; `pdserve down` ends it")
    else:
        raise LaunchError("no Ray cluster: set RAY_ADDRESS, or start one with `pdserve up`")


class Deployment:
    """One deployment's controller, seen from an operator's process."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self._controller = answered(lambda: ray.get_actor(CONTROLLER, namespace=namespace(name)))
        except ValueError:
            raise LaunchError(f"no deployment {name!r} in this Ray cluster; `pdserve up` makes one") from None

    def status(self, after: int = -1, timeout_s: float = 0.0) -> dict[str, Any]:
        return self._ask(lambda: self._controller.status.remote(after, timeout_s), _CALL_S + timeout_s)

    def changes(self) -> Iterator[dict[str, Any]]:
        """The status now, then at each change, at least every second."""
        status = self.status()
        while True:
            yield status
            status = self.status(status["version"], _POLL_S)

    def scale(self, targets: dict[str, int]) -> None:
        self._ask(lambda: self._controller.scale.remote(targets), _CALL_S)

    def drain(self, worker_id: str) -> None:
        """Returns when the worker is gone."""
        self._ask(lambda: self._controller.drain.remote(worker_id), None)

    def canary(self, source: str, target: str, num_blocks: int) -> dict[str, Any]:
        return self._ask(lambda: self._controller.canary.remote(source, target, num_blocks), 60.0)

    def versions(self) -> dict[str, dict[str, str]]:
        return self._ask(lambda: self._controller.versions.remote(), _CALL_S)

    def down(self) -> None:
        """Ends every process of this deployment; the Ray cluster stays. Those on this machine are gone on return."""
        answered(_named_actors, _PROBE_S)
        here = ray.util.get_node_ip_address()
        pids = []
        with contextlib.suppress(LaunchError):
            status = self.status()
            pids = [part["pid"] for part in [*parts(status), status["controller"]] if part["host"] == here]
        try:
            self._ask(lambda: self._controller.down.remote(), _DOWN_S)
        finally:
            answered(self._kill_all)
            _wait_until_gone(pids)

    def _kill_all(self) -> None:
        for actor in _named_actors():
            if actor["namespace"] == namespace(self.name) and actor["name"] != CONTROLLER:
                with contextlib.suppress(ValueError):
                    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
        ray.kill(self._controller)

    def _ask(self, call: Callable[[], Any], timeout_s: float | None) -> Any:
        try:
            return answered(lambda: ray.get(call(), timeout=timeout_s), None)
        except GetTimeoutError:
            raise LaunchError(f"the controller of {self.name!r} did not answer within {timeout_s:g} s") from None
        except RayError as error:
            raise LaunchError(explain(error)) from None


def up(config: DeploymentConfig, say: Say, wait: bool = True, builders: Builders | None = None) -> Deployment:
    """Creates the deployment in the connected cluster. With `wait`, returns once every worker is ready.

    Raises LaunchError with the worker's own error, or with what a pending worker waits for, and leaves nothing behind.
    """
    if is_up(config.name):
        raise LaunchError(f"deployment {config.name!r} is up already; `pdserve down` ends it")
    tell_idle_gpus(config, say)
    if local_ray.running() and builders is None:
        resolve(config.model.path, say)  # one node: what is slow the first time happens here, where it can be watched
    answered(lambda: _create_controller(config, builders or Builders()))
    deployment = Deployment(config.name)
    try:
        if wait:
            _wait_until_ready(deployment, config, say)
    except Unreachable:
        raise
    except BaseException:
        with contextlib.suppress(LaunchError):  # what went wrong first is what the operator should hear
            deployment.down()
        raise
    return deployment


def _create_controller(config: DeploymentConfig, builders: Builders) -> None:
    forget(config.name)
    home = ray.get_runtime_context().get_node_id()
    controller: Any = Controller
    options: dict[str, Any] = {"name": CONTROLLER, "namespace": config.namespace, "lifetime": "detached"}
    if config.runtime_env:
        options["runtime_env"] = config.runtime_env
    controller.options(
        **options,
        scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(home, soft=True),
    ).remote(config, home, builders)


def tell_idle_gpus(config: DeploymentConfig, say: Say) -> None:
    """One line if the connected cluster has GPUs in nobody's use and none of the pools asks for any."""
    wanted = sum(config.pools[name].num_gpus for name in ROLES if config.pools[name].replicas)
    idle = answered(ray.available_resources).get("GPU", 0)
    if idle and not wanted:
        say(
            f"{idle:g} GPU{'s are' if idle != 1 else ' is'} idle, and the workers will run on CPUs: to use them, set"
            " pools.prefill.num_gpus=1 and pools.decode.num_gpus=1 (with --set, or in the file)"
        )


def is_up(name: str) -> bool:
    try:
        answered(lambda: ray.get_actor(CONTROLLER, namespace=namespace(name)))
    except ValueError:
        return False
    return True


def down(name: str, say: Say) -> None:
    """Ends the deployment, and the local Ray cluster if `up` started it and no other deployment is in it."""
    try:
        connect(lambda line: None)
    except LaunchError:
        stop_local_ray(say)  # it does not even answer
        raise
    try:
        Deployment(name).down()
        say(f"deployment {name!r} is down")
    finally:
        stop_local_ray(say, but=name)


def stop_local_ray(say: Say, but: str = "") -> None:
    """Ends the cluster that `up` started, unless it still holds a deployment other than `but`."""
    local = local_ray.running()
    if local is None:
        return
    if ray.is_initialized() and ray.get_runtime_context().gcs_address == local.address:
        others: set[str] = set()
        with contextlib.suppress(Unreachable):
            others = {a["namespace"] for a in answered(_named_actors, _PROBE_S) if a["name"] == CONTROLLER}
        others.discard(namespace(but))
        ray.shutdown()
        if others:
            say(f"the local Ray cluster stays for {', '.join(sorted(others))}")
            return
    local_ray.stop(local)
    say("the local Ray cluster is stopped")


def parts(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Router and workers of a status, in the order in which they are shown."""
    return [status["router"], *(worker for pool in status["pools"].values() for worker in pool["workers"])]


def is_settled(status: dict[str, Any]) -> bool:
    """Every pool has exactly its target of ready workers, and the router runs."""
    sizes = all(len(p["workers"]) == p["ready"] == p["target"] for p in status["pools"].values())
    return sizes and status["router"]["state"] == "ready"


def _wait_until_ready(deployment: Deployment, config: DeploymentConfig, say: Say) -> None:
    seen: dict[str, tuple[str, str]] = {}
    placing_since: dict[str, float] = {}
    for status in deployment.changes():
        for part in parts(status):
            now = (part["state"], part["detail"])
            if seen.get(part["id"]) != now:
                seen[part["id"]] = now
                if part["detail"] or part["state"] in ("ready", "failed", "lost"):
                    say(f"{part['id']:<12} {part['state']:<9} {part['detail']}".rstrip())
            if part["state"] == "failed":
                raise LaunchError(f"{part['id']} did not start: {part['detail']}")
            if part["state"] != "placing":
                placing_since.pop(part["id"], None)
                continue
            waited_s = time.monotonic() - placing_since.setdefault(part["id"], time.monotonic())
            # Without a reason there is room, and Ray is about to start the process.
            limit_s = config.placement_timeout_s if part["detail"] else config.startup_timeout_s
            if waited_s > limit_s:
                detail = part["detail"] or "Ray has not started its process"
                raise LaunchError(f"{part['id']} found no place within {limit_s:g} s: {detail}")
        if is_settled(status):
            return


def _wait_until_gone(pids: list[int]) -> None:
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    psutil.wait_procs(processes, timeout=_GONE_S)


def answered(call: Callable[[], T], within_s: float | None = _ANSWER_S) -> T:
    """What a call to Ray returns or raises; Unreachable if it takes too long. None: the call has a limit of its own.

    Ray's own calls wait for a dead head for a minute and more, in C++ and deaf to Ctrl-C, so they do it in a thread.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="ray-call", daemon=True).start()
    done, _ = wait([outcome], within_s)
    if not done:
        raise Unreachable(f"the Ray cluster did not answer within {within_s:g} s; is its head alive?")
    return outcome.result()


def _named_actors() -> list[dict[str, str]]:
    return ray.util.list_named_actors(all_namespaces=True)


def _join(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except (OSError, ValueError) as error:
        raise LaunchError(f"no Ray cluster answers at {address}: {error}") from None
    try:
        answered(lambda: ray.init(address=address, log_to_driver=False, logging_level="error"), _JOIN_S)
    except Unreachable:
        raise
    except Exception as error:  # versions that differ, a wrong token, and what else Ray refuses
        raise LaunchError(f"cannot join the Ray cluster at {address}: {explain(error)}") from None


def _join_local(local: local_ray.LocalRay) -> None:
    local_ray.loopback_only()
    _use_rays_token()
    _join(local.address)


def _use_rays_token() -> None:
    """What ray.init() does itself for a cluster that it finds or starts, and omits for one that is named to it."""
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _running_cluster() -> str:
    """The address that the last `ray start` on this machine left behind, if something answers there."""
    from ray._private.services import find_bootstrap_address

    address = find_bootstrap_address(None)
    if not address:
        return ""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except (OSError, ValueError):
        return ""
    return address


def _object_store_bytes(transport: str) -> int:
    """Large enough for KV on its way when KV goes through it, else as small as Ray likes."""
    wanted = 1 << 30 if transport == "ray_store" else 128 << 20
    return max(80 << 20, min(wanted, shutil.disk_usage("/dev/shm").free // 2))
