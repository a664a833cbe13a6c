"""Every benchmark can be imported: those for GPUs run nowhere else in tests."""

import importlib
import pkgutil

import pytest

import benchmarks

OURS = {"benchmarks", "cluster", "decode_worker", "engine", "kv_transfer", "prefill_worker", "protos", "router"}


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(benchmarks.__path__)])
def test_it_can_be_imported(name: str) -> None:
    try:
        importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in OURS:
            raise
        pytest.skip(f"needs {error.name}")
