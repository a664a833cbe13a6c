"""What the network does to a transfer over gRPC, and who may speak to its port."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio
import numpy as np
import pytest
import torch

import kv_transfer
from kv_transfer.base import Manifest, ManifestBuilder
from kv_transfer.frames import HEADER_BYTES, Ack, begin_frame, chunk_frame, end_frame, placed_frame, token_frame
from kv_transfer.grpc_stream import PUSH
from protos import kv_transfer_pb2 as kv
from protos import kv_transfer_pb2_grpc as kv_grpc
from protos.grpc_options import SERVER_OPTIONS
from tests.transfer import (
    NUM_LAYERS,
    SOURCE,
    DictStore,
    Pair,
    from_afar,
    make_chunk,
    make_memory,
    needs_nixl,
    transfer_pair,
)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with transfer_pair("grpc") as pair:
        yield pair


@contextlib.asynccontextmanager
async def proxy(address: str, tamper: Callable[[bytes], bytes]) -> AsyncIterator[str]:
    """A loopback proxy that passes what the client sends through `tamper`."""
    host, port = address.rsplit(":", 1)
    tasks: set[asyncio.Task] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(change(data))
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(port))
        tasks.add(asyncio.create_task(pump(reader, there[1], tamper)))
        tasks.add(asyncio.create_task(pump(there[0], writer, lambda data: data)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("place", ["payload", "position"])
async def test_a_flipped_byte_is_never_committed(pair: Pair, place: str):
    """Plaintext gRPC delivers a damaged message with status OK."""
    num_flips = 0

    def tamper(data: bytes) -> bytes:
        nonlocal num_flips
        mark = data.find(marker)
        if mark < 0 or num_flips:
            return data
        num_flips += 1
        at = mark + len(marker) if place == "payload" else mark - HEADER_BYTES + 28
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    marker = bytes(range(1, 101))
    pair.source.slab[3, : len(marker)] = torch.tensor(list(marker), dtype=torch.uint8)
    transfer_id = pair.grant([1, 2])
    async with proxy(pair.address, tamper) as address:
        outgoing = (await pair.connect(address)).open(transfer_id, 8192)
        outgoing.push([3, 4], 0, 0, NUM_LAYERS)
        with pytest.raises(kv_transfer.TransferCorrupt if place == "payload" else kv_transfer.TransferError):
            await pair.receiver.commit(transfer_id, await outgoing.finish())
    assert num_flips == 1 and pair.receiver.release(transfer_id)


@pytest.mark.parametrize("at", [28, 32, 36, HEADER_BYTES - 1], ids=["block", "count", "bytes", "checksum"])
@pytest.mark.parametrize("transport", ["placed over grpc", pytest.param("nixl", marks=needs_nixl)])
async def test_a_damaged_announcement_is_never_committed(at: int, transport: str):
    """What a one-sided writer of another host says of its chunks crosses the wire, too."""
    async with transfer_pair(transport) as pair:
        endpoint = from_afar(pair.endpoint) if transport == "nixl" else pair.endpoint
        transfer_id = pair.grant([1, 2])
        mark, num_flips = b"KV\x04\x05" + transfer_id, 0

        def tamper(data: bytes) -> bytes:
            nonlocal num_flips
            start = data.find(mark)
            if start < 0 or num_flips:
                return data
            num_flips += 1
            return data[: start + at] + bytes([data[start + at] ^ 1]) + data[start + at + 1 :]

        async with proxy(pair.address, tamper) as address:
            link = await pair.connect(address, endpoint)
            outgoing = link.open(transfer_id, None, pair.receiver.placement(transfer_id))
            outgoing.push([3, 4], 0, 0, NUM_LAYERS)
            with pytest.raises((kv_transfer.TransferCorrupt, kv_transfer.TransferBroken)):
                await pair.receiver.commit(transfer_id, await outgoing.finish())
        assert num_flips == 1
        await pair.give_up(outgoing, transfer_id)


async def test_a_byte_that_changed_in_the_store_is_never_committed():
    class Damaging(DictStore):
        def get(self, token: bytes, num_bytes: int, timeout_s: float) -> tuple[np.ndarray, bool]:
            array = super().get(token, num_bytes, timeout_s)[0].copy()
            array[-1] ^= 16
            return array, False

    async with transfer_pair("ray_store", Damaging()) as pair:
        transfer_id = pair.grant([1, 2])
        outgoing = pair.open(transfer_id)
        outgoing.push([3, 4], 0, 0, NUM_LAYERS)
        with pytest.raises(kv_transfer.TransferCorrupt, match="checksum"):
            await outgoing.finish()
        with pytest.raises(kv_transfer.TransferCorrupt, match="checksum"):
            await pair.receiver.commit(transfer_id, Manifest(1, 1, b""))
        assert pair.receiver.release(transfer_id)


async def test_a_damaged_token_is_not_looked_up():
    store = DictStore()
    async with transfer_pair("ray_store", store) as pair:
        transfer_id = pair.grant([1])
        header, pages = make_chunk(pair.source, 0, [3], 0, (0, NUM_LAYERS))
        frame = bytearray(token_frame(transfer_id, header, store.put(pages)[0]))
        frame[-1] ^= 1
        with pytest.raises(kv_transfer.TransferCorrupt, match="token"):
            await push_raw(pair.address, begin_frame(transfer_id, SOURCE), bytes(frame))


async def test_objects_are_bounded_and_dropped():
    store = DictStore()
    source, target = make_memory(64, seed=1), make_memory(64)
    async with transfer_pair("ray_store", store, source, target, max_chunk_bytes=8192) as pair:
        transfer_id = pair.grant(range(64))
        outgoing = pair.open(transfer_id)
        outgoing.push(range(64), 0, 0, NUM_LAYERS)
        await pair.receiver.commit(transfer_id, await outgoing.finish())
        assert store.num_put == 64 and store.max_objects <= 6 and not store.objects
        outgoing = pair.open(b"forged forged!!!")
        outgoing.push(range(64), 0, 0, NUM_LAYERS)
        with pytest.raises(kv_transfer.TransferRefused):
            await outgoing.finish()
        assert not store.objects


async def push_raw(address: str, *messages: bytes) -> int:
    """What a peer with code of its own may send; raises the receiver's verdict."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(PUSH)(iter(messages), timeout=5)
        num_chunks = 0
        async for answer in call:
            ack = Ack.parse(answer)
            num_chunks = ack.num_chunks
            if ack.error is not None:
                raise ack.error
        return num_chunks


async def test_only_well_formed_streams(pair: Pair):
    transfer_id = pair.grant([1, 2])
    begin, other = begin_frame(transfer_id, SOURCE), begin_frame(bytes(16), SOURCE)
    chunk = chunk_frame(transfer_id, *make_chunk(pair.source, 0, [3], 0, (0, 1)))
    for messages, text in [
        ((b"",), "frame of 0 bytes"),
        ((b"GET / HTTP/1.1" * 9,), "not a frame"),
        ((b"KV\x01" + begin[3:],), "not a frame"),
        ((b"KV\x04\x09" + begin[4:],), "not a frame"),
        ((chunk,), "CHUNK before BEGIN"),
        ((begin[:-1] + b"x",), "BEGIN frame's checksum"),
        ((other,), "unknown"),
        ((), "before BEGIN"),
    ]:
        with pytest.raises(kv_transfer.TransferError, match=text):
            await push_raw(pair.address, *messages)
    assert pair.receiver.heartbeat([transfer_id]) == []  # none of it touched the ticket


@pytest.mark.parametrize("transport", ["grpc", "ray_store", "placed over grpc"])
@pytest.mark.parametrize("fault", ["repeat", "gap", "second begin", "other transfer", "no end", "early end", "short"])
async def test_a_stream_out_of_order_fails(transport: str, fault: str):
    store = DictStore() if transport == "ray_store" else None

    def frame(transfer_id: bytes, sequence: int, layer: int) -> bytes:
        header, pages = make_chunk(pair.source, sequence, [3], 0, (layer, layer + 1))
        if pair.is_one_sided:  # the writer has done its part
            pair.target.write([1], layer, layer + 1, pages)
            return placed_frame(transfer_id, header)
        if store is None:
            return chunk_frame(transfer_id, header, pages)
        return token_frame(transfer_id, header, store.put(pages)[0])

    async with transfer_pair(transport, store) as pair:
        await out_of_order(pair, fault, frame)


async def out_of_order(pair: Pair, fault: str, frame: Callable[[bytes, int, int], bytes]) -> None:
    transfer_id = pair.grant([1, 2])
    begin = begin_frame(transfer_id, SOURCE)
    chunks = [frame(transfer_id, index, layer) for index, layer in enumerate((0, 1, 3))]
    foreign = frame(bytes(16), 1, 1)
    messages = {
        "repeat": (begin, chunks[0], chunks[0]),
        "gap": (begin, chunks[0], chunks[2]),
        "second begin": (begin, chunks[0], begin),
        "other transfer": (begin, chunks[0], foreign),
        "no end": (begin, *chunks),
        "early end": (begin, chunks[0], end_frame(transfer_id, Manifest(2, 2048, bytes(32)))),
        "short": (begin, chunks[0][:-1]),
    }[fault]
    with pytest.raises((kv_transfer.TransferBroken, kv_transfer.TransferCorrupt)) as first:
        await push_raw(pair.address, *messages)
    with pytest.raises(type(first.value)):
        await pair.receiver.commit(transfer_id, Manifest(3, 9, b""))
    assert pair.receiver.release(transfer_id)


async def test_a_replayed_stream_is_refused(pair: Pair):
    transfer_id = pair.grant([1])
    header, pages = make_chunk(pair.source, 0, [3], 0, (0, NUM_LAYERS))
    manifest = ManifestBuilder()
    manifest.add(header)
    end = end_frame(transfer_id, manifest.manifest())
    messages = (begin_frame(transfer_id, SOURCE), chunk_frame(transfer_id, header, pages), end)
    assert await push_raw(pair.address, *messages) == 1
    with pytest.raises(kv_transfer.TransferRefused, match="once"):
        await push_raw(pair.address, *messages)


class Servicer(kv_grpc.KvTransferServiceServicer):
    async def Release(self, request: kv.ReleaseRequest, context: grpc.aio.ServicerContext) -> kv.ReleaseResponse:
        return kv.ReleaseResponse(found=True)


@pytest.mark.parametrize("push_first", [True, False])
async def test_push_lives_beside_the_protobuf_service(pair: Pair, push_first: bool):
    server = grpc.aio.server(options=SERVER_OPTIONS)
    if push_first:
        kv_transfer.serve("grpc", pair.receiver, server)
    kv_grpc.add_KvTransferServiceServicer_to_server(Servicer(), server)
    if not push_first:
        kv_transfer.serve("grpc", pair.receiver, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    transfer_id = pair.grant([1])
    outgoing = (await pair.connect(address)).open(transfer_id)
    outgoing.push([3], 0, 0, NUM_LAYERS)
    await pair.receiver.commit(transfer_id, await outgoing.finish())
    async with grpc.aio.insecure_channel(address) as channel:
        assert (await kv_grpc.KvTransferServiceStub(channel).Release(kv.ReleaseRequest(), timeout=5)).found
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await kv_grpc.KvTransferServiceStub(channel).Canary(kv.CanaryRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await server.stop(None)
