"""Triton's interpreter, for kernels' tests where there is no GPU, and what the kernels' sums come to."""

import pytest
import torch


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 turns one-element arrays into loop bounds with int(), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    own = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        own(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def total(digests: torch.Tensor) -> int:
    """The digest of what one launch of a push kernel moved: its programs' sums, modulo 2^64."""
    return int(digests.sum()) % 2**64
