"""A sender or receiver in a process of its own, to be killed. Prints one line when it is ready to be.

python -m tests.transfer_peer send ADDRESS TICKET_HEX NUM_CHUNKS    pushes that many chunks, a block each, then waits
python -m tests.transfer_peer receive                               prints address and ticket of 8 blocks
"""

import asyncio
import sys

from kv_transfer.base import Endpoint
from tests.transfer import LAYER_OFFSETS, NUM_LAYERS, SOURCE, make_memory, transfer_pair


async def send(address: str, transfer_id: bytes, num_chunks: int) -> None:
    import kv_transfer

    sender = kv_transfer.create_sender("grpc", make_memory(32, seed=1), SOURCE)
    link = await sender.connect(address, Endpoint("grpc"))
    outgoing = link.open(transfer_id, max_chunk_bytes=LAYER_OFFSETS[-1])
    if num_chunks:
        outgoing.push(range(num_chunks), 0, 0, NUM_LAYERS)
    print("pushed", flush=True)
    await outgoing.wait_closed()


async def receive() -> None:
    async with transfer_pair("grpc") as pair:
        print(pair.address, pair.grant(range(8), lease_s=600).hex(), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "send":
        asyncio.run(send(sys.argv[2], bytes.fromhex(sys.argv[3]), int(sys.argv[4])))
    else:
        asyncio.run(receive())
