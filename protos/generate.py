"""Regenerate the Python stubs beside the .proto files: `python -m protos.generate`, from the repository's root.

grpcio-tools 1.76.0 is the pin on purpose: its stubs import under protobuf 6.31 to 7.x and grpcio from 1.76 on, while a
newer generator's stubs demand its own newer runtime, which a GPU image may lack.
"""

import sys
from pathlib import Path

PROTOS = ("protos/inference.proto", "protos/kv_transfer.proto", "protos/worker.proto")


def generate(root: Path, out: Path) -> None:
    """Write *_pb2.py, *_pb2.pyi and *_pb2_grpc.py for every proto under `root` into `out`. Raises RuntimeError."""
    import grpc_tools
    from grpc_tools import protoc

    well_known = Path(grpc_tools.__file__).parent / "_proto"
    arguments = [f"-I{root}", f"-I{well_known}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    status = protoc.main(["protoc", *arguments, *PROTOS])
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status}")


if __name__ == "__main__":
    repository = Path(__file__).resolve().parent.parent
    generate(repository, repository)
    sys.exit(0)
