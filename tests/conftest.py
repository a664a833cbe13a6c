"""What every test shares: the demo model, a tiny one, and no leftovers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Two cores for everything: one thread per engine, or they fight (one competitor makes a GEMM forty times slower).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)
# Without a GPU the kernels' tests run in Triton's interpreter, and it looks only once, when it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


# Tests that start Ray have the machine for themselves: `up` joins a cluster that runs on it, and Ray's daemons give up
# when they start too slowly.
RAY_MODULES = ("test_cli", "test_cluster", "test_deployment", "test_transfer_kills", "test_transfer_ray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        is_rays = "ray_store" in item.name and item.path.stem != "test_returns"  # that has a store of its own
        if item.path.stem in RAY_MODULES or is_rays:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    from cluster.models import resolve

    return resolve("smollm2", print)


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.service import tiny_model

    return tiny_model(smollm2, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def checkpoint(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file, since random weights are another device's others, with weights so large that its answers differ."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.service import tiny_model

    directory = tiny_model(smollm2, tmp_path_factory.mktemp("checkpoint"), tie_word_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of 4 layers; for engines alone, it has no tokenizer."""
    from tests.engines import checkpoint

    return checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def pair(llama: Path) -> Iterator[tuple[Any, ...]]:
    """Two engines that live as long as the module, each with its listener."""
    from tests.engines import Listener, make_engine

    la, lb = Listener(), Listener()
    with make_engine(llama, la, max_num_batched_tokens=40) as a, make_engine(llama, lb) as b:
        assert a.layout.fingerprint == b.layout.fingerprint
        yield a, b, la, lb


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """Ray on one machine: a head without CPUs, a node labelled for each pool."""
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 << 20}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small}, connect=False
    )
    try:
        cluster.add_node(num_cpus=4, labels={"pool": "prefill"}, resources={"prefill_slots": 3}, **small)
        cluster.add_node(num_cpus=4, labels={"pool": "decode"}, **small)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def ray_stores() -> Iterator[tuple[Any, Any]]:
    """Object stores over a real Ray: the sender's puts in an actor, so that this process, the receiver's, borrows."""
    import ray

    from cluster.object_store import RayObjectStore
    from tests.transfer import ActorStore

    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    try:
        actor = ray.remote(RayObjectStore).options(num_cpus=0).remote()
        yield ActorStore(actor), RayObjectStore()
    finally:
        ray.shutdown()
