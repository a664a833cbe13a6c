"""How far the weights are, said a few times a second at most.

The lines end in "...": something is under way. They hold "N%" where the whole is known.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

SAY_EVERY_S = 0.2
Say = Callable[[str], None]


@contextmanager
def reading(say: Say, path: Path) -> Iterator[None]:
    """While transformers reads the checkpoint in `path`: its own progress bar, as lines to `say`."""
    from transformers.utils import logging

    num_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    often = _Often(say)

    def tell(done: int, total: int) -> None:
        often(lambda: f"reading weights {100 * done // total}% ({done} of {total} tensors, {_size(num_bytes)}) ...")

    def counted(factory: Callable, args: tuple, kwargs: dict) -> Any:
        if kwargs.get("desc") != "Loading weights" or not args:
            return factory(*args, **kwargs)
        return _count(args[0], tell)

    previous = logging.set_tqdm_hook(counted)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


@contextmanager
def making(say: Say) -> Iterator[None]:
    """While a model is built with weights of its own: how many bytes of them there are."""
    often = _Often(say)
    sizes: dict[tuple[int, str], int] = {}  # by module and name: tied ones are registered again

    def registered(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            sizes[id(module), name] = parameter.numel() * parameter.element_size()
            often(lambda: f"making random weights: {_size(sum(sizes.values()))} ...")

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


class _Often:
    def __init__(self, say: Say):
        self._say, self._next = say, 0.0

    def __call__(self, line: Callable[[], str]) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + SAY_EVERY_S
            self._say(line())


def _count(items: Iterable, tell: Callable[[int, int], None]) -> Iterator:
    items = list(items)
    for i, item in enumerate(items):
        tell(i, len(items))
        yield item


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
