"""What every test shares: the demo model, a tiny one, and no leftovers."""

import os
from pathlib import Path

import pytest

# Two cores for everything: one thread per engine, or they fight (one competitor makes a GEMM forty times slower).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    from cluster.models import resolve

    return resolve("smollm2", print)


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.service import tiny_model

    return tiny_model(smollm2, tmp_path_factory.mktemp("tiny"))
