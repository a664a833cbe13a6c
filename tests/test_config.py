"""Settings: what is accepted, and that every refusal names the key, the value and what is allowed."""

from pathlib import Path

import pytest

from cluster.config import DeploymentConfig
from cluster.config_file import ConfigError, keys, load
from cluster.spec import num_threads, worker_spec
from engine.config import EngineConfig
from router.config import RouterConfig


def refusal(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    return str(caught.value)


def test_defaults_are_the_demo() -> None:
    config = load()
    assert config.targets() == {"prefill": 1, "decode": 1, "colocated": 0}
    assert config.model.path == "smollm2" and config.model.name == "SmolLM2-135M-Instruct"
    assert config.router.host == "127.0.0.1"


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "pd.yaml"
    path.write_text(
        """
        model: {path: /models/llama/, dtype: bfloat16}
        pools:
          prefill: {num_gpus: 1, label_selector: {zone: a}}
          decode: {replicas: 3, env: {DEPTH: 3}}
        transport: ray_store
        """
    )
    config = load(
        path,
        ["pools.decode.replicas=2", "pools.prefill.label_selector.ray.io/type=h200", "router.limits.max_logprobs=5"],
    )
    assert config.model.name == "llama"
    assert config.targets() == {"prefill": 1, "decode": 2, "colocated": 0}
    assert config.pools.prefill.label_selector == {"zone": "a", "ray.io/type": "h200"}
    assert config.pools.decode.env == {"DEPTH": "3"}
    assert config.router.to_config("x").limits.max_logprobs == 5


@pytest.mark.parametrize(("said", "is_on"), [(None, False), ("on", True), ("off", False)])
def test_the_way_back_is_off_unless_asked_for(said: str | None, is_on: bool) -> None:
    config = load(None, [f"kv_return={said}"] if said else [])
    assert worker_spec(config, "decode", "decode-0", 0, "", 1).kv_return is is_on


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("pools.decode.replica=2", "pools.decode.replica: unknown key; did you mean pools.decode.replicas?"),
        ("pools.decod.replicas=2", "pools.decod: unknown key; did you mean pools.decode?"),
        ("replicas=2", "replicas: unknown key; did you mean pools.prefill.replicas?"),
        ("max_num_seq=2", "max_num_seq: unknown key; did you mean pools.prefill.max_num_seqs?"),
        ("router.limits.max_logprob=2", "did you mean router.limits.max_logprobs?"),
        ("zzz=2", "zzz: unknown key; known at the top: drain_timeout_s, "),
        ("pools.decode.replicas=-1", "pools.decode.replicas=-1: must be greater than or equal to 0"),
        ("pools.decode.replicas=many", "pools.decode.replicas='many': must be a valid integer"),
        ("pools.decode=3", "pools.decode=3: must be a mapping of keys"),
        ("pools.decode.block_size=33", "pools.decode.block_size=33: must be a multiple of 16"),
        ("pools.decode.num_gpus=1.5", "pools.decode.num_gpus=1.5: must be a whole number"),
        ("pools.decode.resources.slot=0", "pools.decode.resources.slot=0: must be greater than 0"),
        ("router.port=70000", "router.port=70000: must be less than or equal to 65535"),
        ("router.max_attempts=99", "router: max_attempts is 99; allowed is [1, 16]"),
        ("transport=pigeon", "transport='pigeon': must be 'auto', 'cuda_ipc', 'nixl', 'grpc' or 'ray_store'"),
        ("name=A b", "name='A b'"),
        ("pools.prefill.replicas=0", "at least one prefill and one decode worker (or one colocated) are needed"),
        ("pools.decode.replicas", "must be key=value, such as pools.decode.replicas=2"),
    ],
)
def test_refusals_say_what_would_do(override: str, says: str) -> None:
    assert says in refusal(override)


def test_every_problem_is_told_at_once() -> None:
    lines = refusal("router.port=-1", "pools.decode.replicas=-1", "modle.path=x").splitlines()
    assert len(lines) == 3 and any("did you mean model?" in line for line in lines)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "No such file" in refusal(file=tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    assert "not YAML" in refusal(file=tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert "must be a mapping of keys, got list" in refusal(file=tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load(tmp_path / "empty.yaml") == DeploymentConfig()


def test_a_colocated_pool_serves_alone() -> None:
    config = load(None, ["pools.prefill.replicas=0", "pools.decode.replicas=0", "pools.colocated.replicas=2"])
    assert worker_spec(config, "colocated", "colocated-0", 0, "", 1).role == "both"


def test_what_the_layers_are_told() -> None:
    """Every setting reaches the layer that it is for, under that layer's own name and checks."""
    config = load(None, ["pools.decode.max_num_seqs=7", "model.max_model_len=64", "enable_prefix_caching=false"])
    spec = worker_spec(config, "decode", "decode-0", 0, "", 3)
    engine = EngineConfig(model="/m", **spec.engine)
    assert (engine.max_num_seqs, engine.max_model_len, engine.enable_prefix_caching) == (7, 64, False)
    assert (engine.num_threads, engine.device) == (3, "cpu")
    for_tests = {"paged"}  # the CUDA path's parts on a CPU, where they only cost time
    assert set(spec.engine) | {"model"} | for_tests == set(EngineConfig.__dataclass_fields__)
    router = config.router.to_config("name")
    assert router == RouterConfig(served_model_name="name", port=8700)


def test_threads_are_shared_out() -> None:
    pool = load().pools.decode
    assert num_threads(pool, [2], 2) == 1
    assert num_threads(pool, [16], 2) == 8
    assert num_threads(pool, [16], 5) == 3
    assert num_threads(pool, [4], 100) == 1
    assert num_threads(pool, [32] * 10, 10) == 32
    assert num_threads(load(None, ["pools.decode.num_cpus=4"]).pools.decode, [16], 2) == 4
    assert num_threads(load(None, ["pools.decode.num_threads=5"]).pools.decode, [16], 2) == 5


def test_every_key_can_be_set_and_is_described() -> None:
    known = list(keys())
    assert len(known) == len(set(known)) > 60
    assert {"pools.decode.gpu_memory_utilization", "router.limits.max_queued_requests", "runtime_env"} <= set(known)
