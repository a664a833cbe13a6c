"""An allocator that runs out: every tensor that torch makes for an engine's steps passes here and may be refused."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.engine import Engine


class Scarcity(TorchDispatchMode):
    """`refuses(op, shape)`: whether the op-th operation of a launch finds no room for floats of that shape."""

    def __init__(self, refuses: Callable[[int, torch.Size], bool]):
        super().__init__()
        self.refuses = refuses
        self.num_refused = self.num_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_ops += 1
        made = out if isinstance(out, torch.Tensor) else torch.empty(0)
        if made.is_floating_point() and self.refuses(self.num_ops, made.shape):
            self.num_refused += 1
            raise torch.OutOfMemoryError(f"out of memory: no room for {tuple(made.shape)} (a test's doing)")
        return out


def make_scarce(engine: Engine, refuses: Callable[[int, torch.Size], bool]) -> Scarcity:
    """For every launch of that engine from now on."""
    runner, scarcity = engine._runner, Scarcity(refuses)
    own = runner.launch

    def launch(plan, sinks):
        scarcity.num_ops = 0
        with scarcity:
            return own(plan, sinks)

    runner.launch = launch  # type: ignore[method-assign]
    return scarcity
