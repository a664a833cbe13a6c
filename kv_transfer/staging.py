"""Pages in GPU memory to host memory and back, for transports that send bytes: pinned buffers, a stream of its own.

On the model's stream a copy would wait for every step launched before it, and the caller with it. The pinned buffers
are torch's: they go back to its pool as their last view dies, so a transfer holds as many as it has chunks in hand.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@functools.cache
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One per device and purpose. It does not wait for the default stream, and goes before it where both could run."""
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def settled(device: torch.device, purpose: str) -> Iterator[None]:
    """What is launched inside goes to the purpose's stream, and is done at the end."""
    with torch.cuda.device(device), torch.cuda.stream(side_stream(device, purpose)):
        yield
        event = torch.cuda.Event()  # polled, for it takes a fraction of a millisecond
        event.record()
        event.synchronize()


def indices(ids: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """On the device; the copy is part of the current stream's work."""
    return torch.tensor(ids, dtype=dtype).pin_memory().to(device, non_blocking=True)


def read(rows: torch.Tensor, ids: Sequence[int]) -> np.ndarray:
    """Those rows of uint8 [blocks, bytes], end to end."""
    staged = torch.empty(len(ids) * rows.shape[1], dtype=torch.uint8, pin_memory=True)
    with settled(rows.device, "read"):
        gathered = rows.index_select(0, indices(ids, rows.device))
        staged.copy_(gathered.view(-1), non_blocking=True)
    return staged.numpy()


def pinned(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """The arrays' bytes, end to end, in a buffer that the device copies from by itself."""
    staged = torch.empty(sum(map(len, arrays)), dtype=torch.uint8, pin_memory=True)
    np.concatenate(arrays, out=staged.numpy())
    return staged


def write(rows: torch.Tensor, ids: Sequence[int], staged: torch.Tensor) -> None:
    """Those rows of uint8 [blocks, bytes] become the staged bytes."""
    with settled(rows.device, "write"):
        rows.index_copy_(0, indices(ids, rows.device), staged.to(rows.device, non_blocking=True).view(len(ids), -1))
