"""Regenerate the Python stubs beside the .proto files: `python -m protos.generate`, from the repository's root.

grpcio-tools 1.76.0 is the pin on purpose: its stubs import under protobuf 6.31 to 7.x and grpcio from 1.76 on, while a
newer generator's stubs demand its own newer runtime, which a GPU image may lack.
"""

import subprocess
import sys
from pathlib import Path

PROTOS = ("protos/inference.proto", "protos/kv_transfer.proto", "protos/worker.proto")


def generate(root: Path, out: Path) -> None:
    """Write *_pb2.py, *_pb2.pyi and *_pb2_grpc.py for every proto under `root` into `out`. Raises RuntimeError.

    In a process of its own: the generator brings its own protobuf, and NIXL's library in the same process ends it.
    """
    arguments = [f"-I{root}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", *PROTOS]
    done = subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=False)
    if done.returncode != 0:
        raise RuntimeError(f"protoc ended with status {done.returncode}")


if __name__ == "__main__":
    repository = Path(__file__).resolve().parent.parent
    generate(repository, repository)
    sys.exit(0)
