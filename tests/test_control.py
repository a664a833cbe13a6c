"""The control socket: what a peer with code of its own may send, who may connect, what slow and dead ends do to others.

That transfers keep their promises over it is the body of tests over every transport (test_transfer.py, `placed`)."""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

import kv_transfer
from kv_transfer import control
from kv_transfer.base import ChunkHeader, Endpoint, Manifest, ManifestBuilder
from kv_transfer.control import NO_TRANSFER, address, new_socket, parse_answer
from kv_transfer.control_link import ControlLink
from kv_transfer.control_server import ControlServer
from kv_transfer.frames import Ack, abort_frame, begin_frame, chunk_frame, end_frame, placed_frame
from kv_transfer.memory import Pages
from tests.transfer import NUM_LAYERS, SOURCE, Pair, make_chunk, transfer_pair


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with transfer_pair("placed") as pair:
        yield pair


class Raw:
    """A peer that says what it likes."""

    def __init__(self, name: str) -> None:
        self.socket = new_socket()
        self.socket.settimeout(5)
        self.socket.connect(address(name))

    def say(self, *frames: bytes) -> None:
        for frame in frames:
            self.socket.send(frame)

    def hear(self) -> tuple[bytes, Ack] | None:
        """None: it was cut off."""
        packet = self.socket.recv(4096)
        return parse_answer(packet) if packet else None

    def verdict(self) -> Ack:
        heard = self.hear()
        assert heard is not None
        return heard[1]


@pytest.fixture
def raw(pair: Pair) -> Iterator[Raw]:
    raw = Raw(pair.endpoint.data.decode())
    yield raw
    raw.socket.close()


def header_of(pair: Pair, block_ids, block_start: int = 0, sequence: int = 0, flip: int = 0) -> ChunkHeader:
    """Of pages that lie at the receiver already."""
    (digest,) = pair.target.digests([Pages(block_ids, block_start, 0, NUM_LAYERS)])
    num_bytes = len(block_ids) * pair.target.width(0, NUM_LAYERS)
    return ChunkHeader(sequence, 0, NUM_LAYERS, block_start, len(block_ids), num_bytes, digest ^ flip)


def manifest_of(*headers: ChunkHeader) -> Manifest:
    manifest = ManifestBuilder()
    for header in headers:
        manifest.add(header)
    return manifest.manifest()


async def moved(pair: Pair, target: int) -> None:
    """A transfer of somebody else's, which must go well whatever happens here."""
    transfer_id = pair.grant([target])
    outgoing = pair.open(transfer_id)
    outgoing.push([3], 0, 0, NUM_LAYERS)
    await pair.receiver.commit(transfer_id, await outgoing.finish())
    assert pair.is_equal([3], [target])


async def test_a_whole_transfer(pair: Pair, raw: Raw):
    transfer_id = pair.grant([5, 6])
    headers = header_of(pair, [5]), header_of(pair, [6], 1, 1)
    raw.say(begin_frame(transfer_id, SOURCE), *(placed_frame(transfer_id, header) for header in headers))
    raw.say(end_frame(transfer_id, manifest_of(*headers)))
    assert await asyncio.to_thread(raw.hear) == (transfer_id, Ack(2))
    await pair.receiver.commit(transfer_id, manifest_of(*headers))


@pytest.mark.parametrize(
    ("nonsense", "text"),
    [
        (b"GET / HTTP/1.1" * 9, "not a frame"),
        (b"x", "frame of 1 bytes"),
        (b"KV\x04\x01" + bytes(5000), "packet of more than 4096"),
        (b"KV\x03\x01" + bytes(60), "not a frame"),
    ],
)
async def test_nonsense_ends_its_link_and_no_other(pair: Pair, raw: Raw, nonsense: bytes, text: str):
    own, others = pair.grant([5]), pair.grant([6])
    outgoing = pair.open(others)
    raw.say(begin_frame(own, SOURCE), nonsense)
    heard = [await asyncio.to_thread(raw.hear) for _ in range(3)]
    assert heard[0] is not None and heard[0][0] == NO_TRANSFER and text in str(heard[0][1].error)
    assert None in heard[1:]
    with pytest.raises(kv_transfer.TransferError, match=text):
        await pair.receiver.commit(own, Manifest(9, 9, b""))
    outgoing.push([3], 0, 0, NUM_LAYERS)
    await pair.receiver.commit(others, await outgoing.finish())
    await moved(pair, 7)


async def test_chunks_of_bytes_do_not_belong_here(pair: Pair, raw: Raw):
    transfer_id = pair.grant([5])
    header, pages = make_chunk(pair.source, 0, [3], 0, (0, 1))
    raw.say(begin_frame(transfer_id, SOURCE), chunk_frame(transfer_id, header, pages))
    assert "CHUNK on a control socket" in str((await asyncio.to_thread(raw.verdict)).error)
    await moved(pair, 7)


@pytest.mark.parametrize("fault", ["repeat", "gap", "flip", "second begin", "early end", "other digest", "abort"])
async def test_a_transfer_out_of_order_fails_and_its_neighbour_does_not(pair: Pair, raw: Raw, fault: str):
    transfer_id, neighbour = pair.grant([5, 6]), pair.grant([8])
    first, second = header_of(pair, [5]), header_of(pair, [6], 1, 1)
    begin, placed = begin_frame(transfer_id, SOURCE), placed_frame(transfer_id, first)
    wrong = Manifest(2, first.num_bytes + second.num_bytes, bytes(32))
    frames, error = {
        "repeat": ((placed, placed), kv_transfer.TransferBroken),
        "gap": ((placed_frame(transfer_id, second),), kv_transfer.TransferBroken),
        "flip": ((placed_frame(transfer_id, header_of(pair, [5], flip=2)),), kv_transfer.TransferCorrupt),
        "second begin": ((placed, begin), kv_transfer.TransferBroken),
        "early end": ((placed, end_frame(transfer_id, manifest_of(first, second))), kv_transfer.TransferBroken),
        "other digest": (
            (placed, placed_frame(transfer_id, second), end_frame(transfer_id, wrong)),
            kv_transfer.TransferCorrupt,
        ),
        "abort": ((placed, abort_frame(transfer_id, "given up")), kv_transfer.TransferBroken),
    }[fault]
    raw.say(begin_frame(neighbour, SOURCE), begin, *frames)
    heard = await asyncio.to_thread(raw.hear)
    assert heard is not None and heard[0] == transfer_id and isinstance(heard[1].error, error)
    with pytest.raises(error):
        await pair.receiver.commit(transfer_id, Manifest(9, 9, b""))
    there = header_of(pair, [8])
    raw.say(placed_frame(neighbour, there), end_frame(neighbour, manifest_of(there)))
    while (heard := await asyncio.to_thread(raw.hear)) is not None and heard[0] == transfer_id:
        assert heard[1].error is not None  # frames that came for it afterwards
    assert heard == (neighbour, Ack(1))
    assert pair.receiver.release(transfer_id) and pair.receiver.release(neighbour)


async def test_tickets_are_refused(pair: Pair, raw: Raw):
    foreign = pair.receiver.grant("other", (SOURCE[0], "another incarnation"), [2], 0, 30, "writer")
    expired = pair.grant([3], lease_s=0)
    for ticket, text in ((b"forged forged!!!", "unknown"), (foreign, "not to"), (expired, "lease")):
        raw.say(begin_frame(ticket, SOURCE))
        heard = await asyncio.to_thread(raw.hear)
        assert heard is not None and heard[0] == ticket
        assert isinstance(heard[1].error, kv_transfer.TransferRefused) and text in str(heard[1].error)
    used = pair.grant([4])
    raw.say(begin_frame(used, SOURCE))
    again = Raw(pair.endpoint.data.decode())
    again.say(begin_frame(used, SOURCE))
    assert "once" in str((await asyncio.to_thread(again.verdict)).error)
    again.say(abort_frame(used, "not mine"), end_frame(used, Manifest(0, 0, b"")))
    assert "not under way" in str((await asyncio.to_thread(again.verdict)).error)
    again.socket.close()
    assert pair.receiver.heartbeat([used]) == []  # none of it touched the one that has begun


async def test_another_users_process_is_turned_away(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    name = pair.endpoint.data.decode()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(kv_transfer.TransferBroken, match=f"of user {os.getuid()}: this is user 12345"):
        await ControlLink.connect(name, SOURCE, 5.0)
    raw = Raw(name)
    assert await asyncio.to_thread(raw.hear) is None
    raw.socket.close()


async def test_without_a_socket_in_reach_grpc_carries_the_word(pair: Pair):
    for name, text in (("pdserve-" + "0" * 32, "cannot be reached"), ("/tmp/somewhere", "is no control socket")):
        link = await pair.connect(pair.address, Endpoint("placed", data=name.encode()))
        assert "announced over gRPC" in link.note and text in link.note
        transfer_id = pair.grant([5])
        outgoing = link.open(transfer_id, None, pair.receiver.placement(transfer_id))
        outgoing.push([9], 0, 0, NUM_LAYERS)
        await pair.receiver.commit(transfer_id, await outgoing.finish())
        assert pair.is_equal([9], [5])
    assert pair.link.note == ""


async def test_a_receiver_that_stops_is_noticed_at_once():
    async with transfer_pair("placed") as pair:
        idle, sealed = pair.grant([5]), pair.grant([6])
        waiting, finishing = pair.open(idle), pair.open(sealed)
        block = threading.Event()
        pair.receiver.placed = lambda *args: block.wait(5)  # type: ignore[method-assign]
        finishing.push([3], 0, 0, NUM_LAYERS)
        manifest = await finishing.seal()  # does not wait for the answer
        assert manifest.num_chunks == 1
        server = next(t for t in threading.enumerate() if t.name == "kv-control")
        control_server: ControlServer = server._target.__self__  # type: ignore[attr-defined]
        closing = asyncio.create_task(asyncio.to_thread(control_server.close))
        await asyncio.sleep(0.05)
        block.set()
        await closing
        for outgoing, text in ((waiting, "the receiver"), (finishing, "the receiver|0 chunks arrived")):
            await asyncio.wait_for(outgoing.wait_closed(), 2)
            with pytest.raises(kv_transfer.TransferBroken, match=text):
                await outgoing.finish()
        del pair.receiver.placed
        await moved(pair, 7)  # told over gRPC from now on


async def test_a_sender_that_dies_is_noticed_at_once(pair: Pair):
    transfer_id = pair.grant([5, 6])
    placed = placed_frame(transfer_id, header_of(pair, [5]))
    code = "import socket,sys,time; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
    code += f"s.connect({address(pair.endpoint.data.decode())!r})\n"
    code += f"s.send({begin_frame(transfer_id, SOURCE)!r}); s.send({placed!r}); print(flush=True); time.sleep(60)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    await pair.received(pair.target.width(0, NUM_LAYERS))
    process.kill()
    with pytest.raises(kv_transfer.TransferBroken, match="the sender is gone"):
        await asyncio.wait_for(pair.receiver.commit(transfer_id, Manifest(9, 9, b"")), 2)
    await process.wait()


async def test_a_receiver_that_is_busy_blocks_nobody():
    """More frames than the socket holds: those who send go on, and all of it is checked in the end."""
    async with transfer_pair("placed", progress_s=20.0) as pair:
        go_on, place = threading.Event(), pair.receiver.placed

        def slow(*args) -> None:
            assert go_on.wait(20)
            place(*args)

        pair.receiver.placed = slow  # type: ignore[method-assign]
        tickets = []
        for index in range(300):
            ticket = pair.receiver.grant(str(index), SOURCE, [index % 32], 0, 60.0, "writer")
            outgoing = pair.open(ticket)
            for layer in range(NUM_LAYERS):
                outgoing.push([index % 32], 0, layer, layer + 1)
            tickets.append((ticket, outgoing))
        manifests = [await asyncio.wait_for(outgoing.seal(), 10) for _, outgoing in tickets]
        assert pair.receiver.bytes_received == 0
        go_on.set()
        for (ticket, outgoing), manifest in zip(tickets, manifests, strict=True):
            assert await outgoing.finish() == manifest
            await pair.receiver.commit(ticket, manifest)


async def test_a_sender_that_reads_no_answers_is_cut_off(pair: Pair, raw: Raw, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kv_transfer.control_server.MAX_BACKLOG", 100)
    with contextlib.suppress(OSError):
        for _ in range(5000):
            await asyncio.to_thread(raw.say, begin_frame(b"forged forged!!!", SOURCE))
    with contextlib.suppress(OSError):
        while await asyncio.to_thread(raw.hear) is not None:
            pass
    await moved(pair, 7)


async def test_a_check_that_fails_unforeseen_fails_its_transfer_only(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pair.receiver, "placed", lambda *args: 1 / 0)
    transfer_id = pair.grant([5])
    outgoing = pair.open(transfer_id)
    outgoing.push([3], 0, 0, NUM_LAYERS)
    with pytest.raises(kv_transfer.TransferBroken, match="the receiver failed: ZeroDivisionError"):
        await outgoing.finish()
    monkeypatch.undo()
    await pair.give_up(outgoing, transfer_id)
    await moved(pair, 7)


async def test_nothing_is_left_behind():
    def held() -> tuple[int, set[str]]:
        """Open files but for guard tables, which live as long as their mapping, and threads."""
        num_files = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                num_files += "guards" not in os.readlink(f"/proc/self/fd/{fd}")
        return num_files, {thread.name for thread in threading.enumerate()}

    async with transfer_pair("placed") as pair:  # what is made once
        await moved(pair, 7)
    before = held()
    for _ in range(3):
        async with transfer_pair("placed") as pair:
            await moved(pair, 7)
            assert "kv-control" in held()[1]
    assert held()[0] == before[0] and "kv-control" not in held()[1]


def test_names():
    assert control.is_name(control.new_name()) and control.new_name() != control.new_name()
    assert not control.is_name("../pdserve") and not control.is_name(control.new_name() + "\n")
