"""The Ray cluster that `up` starts when there is none: one node, loopback only, one keeper process that owns it all.

`python -m cluster.local_ray` is the keeper: it starts Ray, prints the address, and ends Ray when it gets SIGTERM. Ray's
own reaper ends the rest should the keeper be killed. A file in the cache says which keeper runs, so that `down`, in
another process, ends this cluster and never somebody else's.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.models import cache_dir

_START_S = 60.0
_STOP_S = 20.0
_READY = "ready "


class LocalRayError(RuntimeError):
    """The local Ray cluster did not start; the message ends with its own last words."""


@dataclass(frozen=True, slots=True)
class LocalRay:
    pid: int  # of the keeper
    created: float  # its start, so that a recycled pid is not mistaken for it
    address: str
    directory: str


def running() -> LocalRay | None:
    """The cluster that an earlier `up` started on this machine, if it is still there."""
    try:
        local = LocalRay(**json.loads(_state_file().read_text()))
        alive = abs(psutil.Process(local.pid).create_time() - local.created) < 1.0
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    return local if alive else None


def start(object_store_bytes: int, carries_kv: bool) -> LocalRay:
    """Starts a cluster that outlives this process, or takes the one that somebody started just now. LocalRayError.

    `carries_kv`: its object store is to collect freed objects a hundred times a second, not once: KV on its way would
    fill it with what is done with. That costs an idle machine 0.3% of a core.
    """
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / ".local-ray.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return running() or _start(object_store_bytes, carries_kv)


def stop(local: LocalRay) -> None:
    """Ends the cluster and waits until none of its processes is left."""
    _end(local.pid)
    shutil.rmtree(local.directory, ignore_errors=True)
    _state_file().unlink(missing_ok=True)


def loopback_only() -> None:
    """Makes Ray in this process accept 127.0.0.1 as a node's address, so that nothing listens on other interfaces.

    On Linux Ray replaces a loopback address by the machine's own one, for clusters that may grow. This one never does.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for processes that this one starts
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False


def _start(object_store_bytes: int, carries_kv: bool) -> LocalRay:
    directory = tempfile.mkdtemp(prefix="pdserve-ray-", dir="/tmp")  # short: it holds unix sockets
    command = [sys.executable, "-m", "cluster.local_ray", directory, str(object_store_bytes)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    if carries_kv:
        environment.setdefault("RAY_free_objects_period_milliseconds", "10")
    with open(Path(directory) / "keeper.log", "w") as log:
        keeper = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            env=environment,
            text=True,
        )
    try:
        local = LocalRay(keeper.pid, psutil.Process(keeper.pid).create_time(), _read_address(keeper), directory)
        _state_file().write_text(json.dumps(asdict(local)))
        return local
    except BaseException as error:  # Ctrl-C too: what nobody knows of, nobody can end
        _end(keeper.pid)
        last_words = (Path(directory) / "keeper.log").read_text().strip().splitlines()[-1:] or ["no output"]
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, LocalRayError):
            raise LocalRayError(f"{error}: {last_words[0]}") from None
        raise


def _read_address(keeper: "subprocess.Popen[str]") -> str:
    assert keeper.stdout is not None
    with keeper.stdout as output:
        answered, _, _ = select.select([output], [], [], _START_S)
        line = output.readline() if answered else ""
    if not line.startswith(_READY):
        raise LocalRayError("Ray did not start on this machine")
    return line.removeprefix(_READY).strip()


def _end(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        keeper = psutil.Process(pid)
        family = [keeper, *keeper.children(recursive=True)]
        keeper.terminate()
        _, left = psutil.wait_procs(family, timeout=_STOP_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_STOP_S)


def _state_file() -> Path:
    return cache_dir() / "local-ray.json"


def _keep(directory: str, object_store_bytes: int) -> None:
    stop_signals = {signal.SIGTERM, signal.SIGINT}
    loopback_only()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=object_store_bytes,
        log_to_driver=False,
        logging_level="error",
        _temp_dir=directory,
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)  # after Ray has started: its processes must be stoppable
    print(f"{_READY}{ray.get_runtime_context().gcs_address}", flush=True)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    signal.sigwait(stop_signals)
    ray.shutdown()


if __name__ == "__main__":
    _keep(sys.argv[1], int(sys.argv[2]))
