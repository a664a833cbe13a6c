"""Pushes load and store 16 bytes at a time where all is aligned, and divide nothing where whole blocks move. Needs no
GPU."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_what_is_aligned_moves_16_bytes_at_a_time():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.push_code"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 30
    for name, ptx in found.items():
        if "ALIGNED=16" in name and "WORD_BYTES=4" in name:
            assert "cp.async.cg.shared.global" in ptx, name
            assert "PUSH=False" in name or "st.global.v4" in ptx, name
        if "WHOLE=True" in name:  # programs wait for them longer than for their loads
            assert not re.search(r"\b(div|rem)\.[su]\d", ptx), name
