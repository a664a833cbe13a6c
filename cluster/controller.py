"""The deployment's controller: a detached actor that owns placement, membership and restarts. Off the request path.

A change here, from wish to effect:
1. `up`, `scale` or `drain` sets how many workers each pool shall have; the targets are saved in Ray's key-value store.
2. _reconcile() adds supervisors for missing workers and retires surplus ones: failing ones first, then the youngest.
3. A supervisor places its actor, follows its start and watches it; a dead one is replaced under the same worker id.
4. Each time a worker becomes ready, drains or dies, publish() tells all workers and then the router who there is.
5. A retired worker leaves only after the router knows that it drains and its last run is over.
6. When the controller itself dies, Ray restarts it: it finds the actors by name, adopts the ready ones, goes on at 2.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import CONTROLLER, RouterActor, WorkerActor
from cluster.config import ROLES, DeploymentConfig, Placement, PoolName, missing_half
from cluster.fencing import Fencing
from cluster.placement import Demand, cluster_nodes, waits_for
from cluster.spec import SEES_ALL_GPUS, Builders, RouterSpec, WorkerSpec, num_threads, worker_spec
from cluster.supervisor import Supervisor, explain, result_of
from protos.worker_pb2 import Members

_ADOPT_S = 10.0
_PUSH_S = 3.0
_REPORT_S = 1.0
_STORE = b"pdserve"
_log = logging.getLogger(__name__)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class Controller:
    """One per deployment. `home` is the node of the one who said `up`: where the router goes unless told otherwise."""

    def __init__(self, config: DeploymentConfig, home: str, builders: Builders) -> None:
        self._config = config
        self._home = home
        self._builders = builders
        self._targets = config.targets()
        self._workers: dict[str, Supervisor] = {}  # by worker id, in order of creation
        self._pool_of: dict[str, PoolName] = {}
        self._fencing = Fencing(self._workers, config.fence_timeout_s, self._spawn)
        self._router = self._supervise_router()
        self._version = 0
        self._changed = asyncio.Condition()
        self._publishing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._booted = asyncio.create_task(self._boot())

    async def status(self, after: int = -1, timeout_s: float = 0.0) -> dict[str, Any]:
        """The deployment as plain data, at once or when its version is above `after`, at most `timeout_s` later."""
        await self._booted
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._version > after), timeout_s)
        version = self._version
        supervised = [*self._workers.values(), self._router]
        await asyncio.gather(*(one.refresh(_REPORT_S) for one in supervised))
        nodes = await asyncio.to_thread(cluster_nodes) if any(one.state == "placing" for one in supervised) else []
        pools = {
            name: {
                "role": ROLES[name],
                "target": self._targets[name],
                "ready": sum(self._workers[i].state == "ready" for i, pool in self._pool_of.items() if pool == name),
                "workers": [
                    self._describe(self._workers[i], self._config.pools[name], nodes)
                    for i, pool in self._pool_of.items()
                    if pool == name
                ],
            }
            for name in ROLES
        }
        return {
            "name": self._config.name,
            "version": version,
            "model": self._config.model.name,
            "transport": self._config.transport,
            "controller": {
                "pid": os.getpid(),
                "node": ray.get_runtime_context().get_node_id(),
                "host": ray.util.get_node_ip_address(),
                "writers_killed": self._fencing.num_killed,
            },
            "router": {
                **self._describe(self._router, self._config.router, nodes),
                "address": self._router.ready.get("address", ""),
            },
            "pools": pools,
        }

    async def scale(self, targets: dict[PoolName, int]) -> None:
        """Sets pool sizes. Returns at once; status() shows how it goes on. ValueError names a bad pool or size."""
        await self._booted
        for pool, count in targets.items():
            if pool not in ROLES:
                raise ValueError(f"{pool}={count}: unknown pool; there are {', '.join(ROLES)}")
            if not 0 <= count <= 1024:
                raise ValueError(f"{pool}={count}: allowed is [0, 1024]")
        self._aim({**self._targets, **targets})

    async def drain(self, worker_id: str) -> None:
        """Takes one worker out of its pool, for good: the pool's target falls by one. Returns when it is gone."""
        await self._booted
        if worker_id not in self._workers or self._workers[worker_id].retiring:
            known = ", ".join(i for i, one in self._workers.items() if not one.retiring)
            raise ValueError(f"worker {worker_id!r}: not in this deployment, which has {known or 'none'}")
        pool = self._pool_of[worker_id]
        task = self._aim({**self._targets, pool: max(0, self._targets[pool] - 1)}, first=worker_id)
        await asyncio.shield(task)

    async def canary(self, source: str, target: str, num_blocks: int) -> dict[str, Any]:
        """Sends and checks a few blocks from one worker to another: {ok, bytes, seconds, error}."""
        try:
            return await self._workers[source].handle.canary.remote(target, num_blocks)
        except Exception as error:  # the doctor reports whatever is wrong with this path
            return {"ok": False, "bytes": 0, "seconds": 0.0, "error": explain(error)}

    async def versions(self) -> dict[str, dict[str, str]]:
        """What each ready worker's process runs on, by worker id."""
        ready = {i: one for i, one in self._workers.items() if one.state == "ready"}
        found = await asyncio.gather(*(one.handle.versions.remote() for one in ready.values()))
        return dict(zip(ready, found, strict=True))

    async def down(self) -> None:
        """Ends the router, then the workers, without draining. Only the controller is left."""
        self._stopping = True
        for task in (self._booted, *self._tasks):
            task.cancel()
        await self._router.retire(None)
        await asyncio.gather(*(one.retire(None) for one in self._workers.values()))
        self._workers.clear()
        self._pool_of.clear()
        await asyncio.to_thread(forget, self._config.name)

    async def publish(self) -> None:
        """Tells everybody who is there. Workers first: a router may use a pair only when the pair know each other."""
        async with self._publishing:
            if self._stopping:
                return
            members = [one.member for one in self._workers.values() if one.member is not None]
            message = Members(members=members).SerializeToString()
            await asyncio.gather(*(one.tell_members(message, _PUSH_S) for one in self._workers.values()))
            await self._router.tell_members(message, _PUSH_S)

    async def _boot(self) -> None:
        self._targets.update(await asyncio.to_thread(recall, self._config.name))
        found = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        names = [actor["name"] for actor in found if actor["namespace"] == self._config.namespace]
        await asyncio.gather(*(self._adopt(name) for name in names if name != CONTROLLER))
        if not self._router.ready:
            self._router.run()
        self._reconcile()
        await self.publish()

    async def _adopt(self, actor_name: str) -> None:
        try:
            handle = ray.get_actor(actor_name, namespace=self._config.namespace)
        except ValueError:  # died meanwhile
            return
        try:
            identity = await asyncio.wait_for(result_of(handle.identity.remote()), _ADOPT_S)
        except Exception as error:
            identity = {"ready": None, "error": error}
        spec = identity.get("spec")
        if not identity["ready"]:  # still loading, for an owner that is gone
            ray.kill(handle)
        elif isinstance(spec, RouterSpec):
            self._router.adopt(handle, identity)
        else:
            worker = self._add(spec.pool, spec.worker_id)
            worker.adopt(handle, identity)
            if identity["draining"]:
                worker.retiring = True
                self._spawn(self._retire(spec.worker_id))

    def _aim(self, targets: dict[PoolName, int], first: str = "") -> asyncio.Task[None]:
        problem = missing_half(targets)
        if problem:
            raise ValueError(problem)
        self._targets = targets
        remember(self._config.name, targets)
        return self._reconcile(first)

    def _reconcile(self, first: str = "") -> asyncio.Task[None]:
        """Brings every pool to its target; `first` goes before others. The task ends when the retired are gone."""
        leaving = []
        for pool, target in self._targets.items():
            staying = [i for i, name in self._pool_of.items() if name == pool and not self._workers[i].retiring]
            for _ in range(target - len(staying)):
                worker_id = next(
                    f"{pool}-{n}" for n in range(len(self._workers) + 1) if f"{pool}-{n}" not in self._workers
                )
                self._add(pool, worker_id).run()
            staying.sort(key=lambda i: (i != first, self._workers[i].state == "ready", -_index(i)))
            leaving += staying[: max(0, len(staying) - target)]
        for worker_id in leaving:
            self._workers[worker_id].retiring = True
        self._touch()
        return self._spawn(self._retire(*leaving))

    async def _retire(self, *worker_ids: str) -> None:
        await asyncio.gather(*(self._workers[i].retire(self._config.drain_timeout_s) for i in worker_ids))
        for worker_id in worker_ids:
            del self._workers[worker_id], self._pool_of[worker_id]
        self._touch()

    def _add(self, pool: PoolName, worker_id: str) -> Supervisor:
        demand = Demand.of(self._config.pools[pool])
        threads = num_threads(self._config.pools[pool], _node_cores(), sum(self._targets.values()))
        actor: Any = WorkerActor

        def create(spec: WorkerSpec) -> Any:
            settings = self._config.pools[pool]
            env = {**(SEES_ALL_GPUS if settings.num_gpus else {}), **settings.env}
            return actor.options(**self._options(spec.actor_name, env), **demand.actor_options()).remote(spec)

        def spec(restarts: int) -> WorkerSpec:
            return worker_spec(self._config, pool, worker_id, restarts, self._builders.worker, threads)

        worker = Supervisor(
            worker_id, create, spec, self._config.startup_timeout_s, self._touch, self.publish, self._reported
        )
        self._workers[worker_id] = worker
        self._pool_of[worker_id] = pool
        return worker

    def _supervise_router(self) -> Supervisor:
        config = self._config.router
        demand = Demand.of(config)
        actor: Any = RouterActor

        def create(spec: RouterSpec) -> Any:
            options = {**self._options(spec.actor_name, {}), **demand.actor_options()}
            if not demand.labels and not demand.resources:
                options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self._home, soft=True)
            return actor.options(**options).remote(spec)

        def spec(restarts: int) -> RouterSpec:
            settings = config.to_config(self._config.model.name)
            if self._router.ready:  # clients know where the last one listened
                settings = dataclasses.replace(settings, port=int(self._router.ready["address"].rpartition(":")[2]))
            return RouterSpec(restarts, self._config.name, self._config.model.path, settings, self._builders.router)

        return Supervisor(
            "router", create, spec, self._config.startup_timeout_s, self._touch, self.publish, lambda report: None
        )

    def _options(self, actor_name: str, env: dict[str, str]) -> dict[str, Any]:
        options: dict[str, Any] = {"name": actor_name, "namespace": self._config.namespace, "lifetime": "detached"}
        runtime_env = dict(self._config.runtime_env)
        if env:
            runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **env}
        return {**options, "runtime_env": runtime_env} if runtime_env else options

    def _describe(self, one: Supervisor, placement: Placement, nodes: list[Any]) -> dict[str, Any]:
        detail = one.detail
        if one.state == "placing":
            reason = waits_for(Demand.of(placement), nodes)
            detail = f"waits for {reason}" if reason else ""
        return {
            "id": one.name,
            "state": one.state,
            "detail": detail,
            "restarts": one.restarts,
            "last_error": one.last_error,
            "address": one.member.address if one.member else "",
            "incarnation": one.member.incarnation if one.member else "",
            "pid": one.where.get("pid"),
            "node": one.where.get("node_id", ""),
            "host": one.where.get("host", ""),
            "report": one.report,
        }

    def _reported(self, report: dict[str, Any]) -> None:
        if self._booted.done():  # before, a writer that lives may not be known
            self._fencing.look(report)

    def _touch(self) -> None:
        self._version += 1
        self._spawn(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a task of the controller failed", exc_info=task.exception())


def _index(worker_id: str) -> int:
    return int(worker_id.rpartition("-")[2])


def _node_cores() -> list[int]:
    """Cores per machine; several Ray nodes on one machine count once."""
    cores: dict[str, int] = {}
    for node in ray.nodes():
        if node["Alive"]:
            address = node["NodeManagerAddress"]
            cores[address] = max(cores.get(address, 0), int(node["Resources"].get("CPU", 0)))
    return list(cores.values())


# What must outlive the controller's process lies in the head's key-value store, as long as the cluster lives. A new
# deployment forgets what one before it, not ended cleanly, may have left.


def remember(deployment: str, targets: dict[PoolName, int]) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(deployment.encode(), json.dumps(targets).encode(), overwrite=True, namespace=_STORE)


def recall(deployment: str) -> dict[PoolName, int]:
    from ray.experimental.internal_kv import _internal_kv_get

    saved = _internal_kv_get(deployment.encode(), namespace=_STORE)
    return json.loads(saved) if saved else {}


def forget(deployment: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(deployment.encode(), namespace=_STORE)
