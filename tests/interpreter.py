"""Triton's interpreter, for kernels' tests where there is no GPU."""

import pytest


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 turns one-element arrays into loop bounds with int(), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    own = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        own(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
