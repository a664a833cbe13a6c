"""Launches of a Triton kernel that was launched before, without what Triton does before each.

It looks at every argument and option again to find the compiled kernel, for some 50 microseconds of a thread that a
transfer waits for. Here a tuple of what its choice depends on finds the same one.
"""

import logging
from typing import Any

import torch

_compiled: dict[tuple[Any, ...], Any] = {}
_log = logging.getLogger(__name__)


def run(kernel: Any, num_programs: int, numbers: tuple[int, ...], constants: dict[str, Any], num_warps: int) -> None:
    """On the current stream. The kernel's parameters are `numbers`, for none of which it is specialized, and then
    `constants`, in order. Of a number it matters only whether 32 bits hold it."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
    widths = tuple([-0x80000000 <= number <= 0x7FFFFFFF for number in numbers])
    key = (kernel, device, num_warps, tuple(constants.values()), widths)
    compiled = _compiled.get(key)
    if compiled is not None:
        try:
            compiled[(num_programs, 1, 1)](*numbers, *constants.values())
            return
        except TypeError as error:  # what a compiled kernel takes is Triton's own affair, and may change
            _log.warning("kernels are launched Triton's way from now on: %s", error)
            _compiled[key] = None
    launched = kernel[(num_programs,)](*numbers, **constants, num_warps=num_warps)
    if key not in _compiled and hasattr(launched, "packed_metadata"):  # the interpreter compiles nothing
        _compiled[key] = launched
