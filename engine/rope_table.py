"""Each position's rotation as the model itself computes it, looked up in every step instead of computed anew.

The model's own module is asked once, for all positions. It takes some nine small kernels a step, before the first
product can begin; the table takes one. What does not give the same bits for any company of positions stays as it is.
"""

from collections.abc import Callable

import torch

MOST_BYTES = 128 << 20  # 131072 positions of 128 in bfloat16 take half
SLICE = 8192  # positions asked for at a time

Rotary = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class RopeTable:
    """Called as the module is: anything, and positions [1, num_tokens]; gives cos and sin, [1, num_tokens, dim]."""

    def __init__(self, table: torch.Tensor):
        self._table = table  # [2, max_len, dim]

    @classmethod
    def of(cls, rotary: Rotary, max_len: int, like: torch.Tensor) -> "RopeTable | None":
        """For positions below `max_len`, in the dtype and on the device of `like`. None: too large, or not the same."""

        def ask(positions: torch.Tensor) -> torch.Tensor:
            return torch.cat(rotary(like, positions[None]))

        def every(start: int, stop: int) -> torch.Tensor:
            return torch.arange(start, stop, device=like.device)

        one = ask(every(0, 1))
        if one.nbytes * max_len > MOST_BYTES or one.shape[:2] != (2, 1):
            return None
        table = one.new_empty(2, max_len, one.shape[2])
        for start in range(0, max_len, SLICE):
            stop = min(start + SLICE, max_len)
            table[:, start:stop] = ask(every(start, stop))
        mixed = torch.randperm(max_len, generator=torch.Generator().manual_seed(0)).to(like.device)
        for some in (mixed[:1], mixed[:7], mixed[:333], every(0, min(7, max_len)), every(max_len - 1, max_len)):
            if not torch.equal(table[:, some], ask(some)):
                return None
        return cls(table)

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = self._table.index_select(1, positions[0])
        return both[:1], both[1:]
