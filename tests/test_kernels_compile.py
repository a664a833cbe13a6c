"""Every kernel compiles for an H100, and but for float8 for an A100, and finds room there. No GPU is asked. What
kernels compute, others test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles(capability: str) -> None:
    root = Path(__file__).parents[1]
    compiler = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", capability],
        env={**compiler, "PYTHONPATH": paths},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    compiled = {line.split(": ")[1].split(",")[0] for line in done.stdout.splitlines() if " bytes, " in line}
    assert compiled >= {
        *("add_norm_kernel", "gated_kernel", "rope_write_kernel", "write_kernel", "gather_kernel", "prepare_kernel"),
        *("merge_kernel", "decode_kernel", "prefill_kernel", "pick_kernel", "pick_last_kernel", "truncate_kernel"),
        *(("move_kernel", "round_kernel") if capability == "90" else ("move_kernel",)),
    }
