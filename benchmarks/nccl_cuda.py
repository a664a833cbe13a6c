"""NCCL between two GPUs, a process each: raw, and with scattered pages as they are sent over it.

python -m benchmarks.nccl_cuda RANK [BLOCK_SIZE ...]      both ranks; rank 0 prints one JSON object of GB/s

contiguous   send and receive of 256 MiB
BLOCK_SIZE   the pages of benchmarks/transfer_cuda.py in the same four stretches of layers: gathered into a buffer,
             sent, received into a buffer, scattered; a stretch is gathered while the one before it is on its way.
             The clock ends when the sender has heard that the last one is scattered.
"""

import json
import random
import sys
from itertools import pairwise

import torch
import torch.distributed as dist

from benchmarks.cuda_peer import make_memory
from benchmarks.transfer_cuda import DIM, HEADS, LAYERS, milliseconds
from benchmarks.transfer_whole import num_pages, pool_size

ROUNDS, STRETCH = 9, 8


def main(rank: int, block_sizes: list[int]) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29517", rank=rank, world_size=2, device_id=device)
    data = torch.empty(32 << 20, dtype=torch.int64, device=device).random_()
    took = milliseconds(lambda: (dist.recv if rank else dist.send)(data, 1 - rank), ROUNDS)
    found = {"contiguous": data.nbytes / 1e6 / took}
    for block_size in block_sizes:
        pool, count = pool_size(block_size), num_pages(block_size)
        memory = make_memory(str(device), block_size, pool, LAYERS, HEADS, DIM, seed=1 if rank == 0 else None)
        words = memory.slab.view(torch.int64)
        pages = torch.tensor(random.Random(rank).sample(range(pool), count), device=device)
        offsets = [memory.layer_offsets[layer] // 8 for layer in range(0, LAYERS + 1, STRETCH)]
        stretches = [words[:, start:stop] for start, stop in pairwise(offsets)]
        token = torch.zeros(1, dtype=torch.int64, device=device)

        def work(stretches=stretches, pages=pages, token=token) -> None:
            (gather_and_send if rank == 0 else receive_and_scatter)(stretches, pages)
            (dist.send if rank else dist.recv)(token, 1 - rank)

        if rank == 0:
            check = words[pages].sum().view(1)
        found[str(block_size)] = count * memory.slab.shape[1] / 1e6 / milliseconds(work, ROUNDS)
        if rank == 1:
            check = words[pages].sum().view(1)
        both = [torch.empty_like(check) for _ in range(2)]
        dist.all_gather(both, check)
        assert both[0] == both[1], "the pages differ"
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def gather_and_send(stretches: list[torch.Tensor], pages: torch.Tensor) -> None:
    works = [dist.isend(stretch.index_select(0, pages), 1) for stretch in stretches]
    for work in works:
        assert work is not None
        work.wait()


def receive_and_scatter(stretches: list[torch.Tensor], pages: torch.Tensor) -> None:
    buffers = [stretch.new_empty(len(pages), stretch.shape[1]) for stretch in stretches]
    works = [dist.irecv(buffer, 0) for buffer in buffers]
    for stretch, buffer, work in zip(stretches, buffers, works, strict=True):
        assert work is not None
        work.wait()
        stretch.index_copy_(0, pages, buffer)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(size) for size in sys.argv[2:]])
