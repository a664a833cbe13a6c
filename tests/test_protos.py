"""The stubs beside the .proto files are what these .proto files generate, and they import."""

import importlib
from pathlib import Path

import pytest

from protos.generate import PROTOS, generate

ROOT = Path(__file__).resolve().parent.parent


def test_generated_code_is_not_stale(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    generate(ROOT, tmp_path)
    fresh = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    assert len(fresh) == 3 * len(PROTOS)
    stale = [name for name, text in fresh.items() if (ROOT / "protos" / name).read_text() != text]
    assert not stale, f"run `make protos`: {stale} differ from what the .proto files generate"


@pytest.mark.parametrize("proto", PROTOS)
def test_generated_modules_import(proto: str) -> None:
    module = proto.removesuffix(".proto").replace("/", ".")
    messages = importlib.import_module(f"{module}_pb2")
    importlib.import_module(f"{module}_pb2_grpc")
    assert messages.DESCRIPTOR.package == "pdserve.v1"
