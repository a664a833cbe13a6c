"""Commit over the control socket: the same task and the same answer as the call's, whatever is lost on the way."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from decode_worker import kv_service
from decode_worker.decoder import Decoder
from decode_worker.kv_service import KvTransferServicer
from decode_worker.runs import Run, RunState
from decode_worker.session import Outbox
from engine.dispatch import Dispatcher
from engine.request import FirstToken, Preempted, Request, SamplingParams, Token
from kv_transfer import control_link, peers
from kv_transfer.base import Answer, Manifest
from kv_transfer.control import NO_TRANSFER, pack_answer, parse_answer
from kv_transfer.control_server import _Link
from kv_transfer.frames import Ack, begin_frame, commit_frame
from kv_transfer.open_transfers import OpenTransfers
from prefill_worker.handoff import Handoff, HandoffFailed
from protos import kv_transfer_pb2 as kv
from tests.service import Service, collect, request, service
from tests.test_control import Raw, moved
from tests.test_returns_faults import SIZES, chats
from tests.test_service_processes import GPU
from tests.transfer import NUM_LAYERS, SOURCE, Pair, needs_nixl, transfer_pair

ENGINE = {"load_format": "dummy", "num_blocks": 128, "num_threads": 1}
NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with transfer_pair("placed") as pair:
        yield pair


async def hear(raw: Raw) -> tuple[bytes, Ack | Answer] | None:
    return await asyncio.to_thread(raw.hear)


@pytest.mark.parametrize("answer", [Ack(3), Answer(0), Answer(5, "no such transfer: é"), Answer(15, "x" * 9000)])
def test_answers_survive_the_wire(answer: Ack | Answer):
    transfer_id, parsed = parse_answer(pack_answer(b"t" * 16, answer))
    assert transfer_id == b"t" * 16
    if isinstance(answer, Answer) and len(answer.text) > 4096:
        assert isinstance(parsed, Answer) and parsed.code == 15 and answer.text.startswith(parsed.text)
    else:
        assert parsed == answer


@pytest.mark.parametrize("packet", [b"", b"t" * 16, b"t" * 16 + b"\1", b"t" * 16 + b"\7abc"])
def test_what_is_no_answer_is_a_broken_transfer(packet: bytes):
    answer = parse_answer(packet)[1]
    assert isinstance(answer, Ack) and "not an acknowledgement" in str(answer.error)


@pytest.mark.parametrize(
    ("claim", "text"),
    [(b"\xff\xff\xff", "no CommitRequest"), (kv.CommitRequest(transfer_id=b"other").SerializeToString(), "another")],
)
async def test_a_commit_that_is_none_ends_its_link_and_no_other(pair: Pair, claim: bytes, text: str):
    raw, transfer_id = Raw(pair.endpoint.data.decode()), pair.grant([5])
    raw.say(begin_frame(transfer_id, SOURCE), commit_frame(transfer_id, claim))
    heard = await hear(raw)
    assert heard is not None and heard[0] == NO_TRANSFER and text in str(heard[1].error)  # type: ignore[union-attr]
    raw.socket.close()
    await moved(pair, 7)


async def test_a_transfer_asks_for_the_call_where_the_socket_cannot_say(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """A commit of too many first tokens for a packet, a link that has ended."""

    async def answered(outgoing) -> Answer | None:
        return await asyncio.wait_for(outgoing.commit_answer(), 2)

    outgoing = pair.open(transfer_id := pair.grant([5]))
    outgoing.push([3], 0, 0, NUM_LAYERS)
    outgoing.commit(lambda manifest: bytes(5000))
    await pair.receiver.commit(transfer_id, await outgoing.finish())
    assert await answered(outgoing) is None

    monkeypatch.setattr(_Link, "answer", lambda *args: None)
    outgoing = pair.open(transfer_id := pair.grant([7]))
    outgoing.push([3], 0, 0, NUM_LAYERS)
    outgoing.commit(lambda manifest: claim_of(transfer_id, manifest).SerializeToString())
    assert await outgoing.seal() == await outgoing.seal()
    asking = asyncio.create_task(answered(outgoing))
    await asyncio.sleep(0.05)
    assert not asking.done()
    outgoing.abort("given up")
    await pair.link.close()
    assert await asking is None
    assert pair.receiver.release(transfer_id)


@pytest.mark.parametrize("is_ended", [True, False])
async def test_commit_follows_the_last_write_by_itself(pair: Pair, is_ended: bool):
    """Nobody on the event loop has to see that all of it has landed. END may have gone before."""
    ready, let = pair.late()
    outgoing = pair.open(transfer_id := pair.grant([5]))
    outgoing.push([3], 0, 0, NUM_LAYERS, ready)
    if is_ended:
        outgoing.end()
        let()
        await outgoing.finish()
    claimed: list[Manifest] = []

    def claim(manifest: Manifest) -> bytes:
        claimed.append(manifest)
        return claim_of(transfer_id, manifest).SerializeToString()

    outgoing.commit(claim)
    outgoing.commit(lambda manifest: b"a second one")
    assert len(claimed) == is_ended
    let()
    answer = await asyncio.wait_for(outgoing.commit_answer(), 5)
    assert answer is not None and answer.code == grpc.StatusCode.UNIMPLEMENTED.value[0]  # the pair has no service
    assert claimed == [await outgoing.finish()]
    await pair.receiver.commit(transfer_id, claimed[0])
    assert pair.is_equal([3], [5])


@pytest.mark.parametrize("code", [grpc.StatusCode.OK, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.NOT_FOUND])
async def test_a_peer_raises_what_the_call_would(code: grpc.StatusCode):
    """And counts what speaks against the transport."""
    unfit: list[str] = []
    answer = Answer(code.value[0], "so it is")
    async with (
        transfer_pair("placed", on_commit=lambda request, tell: tell(answer)) as pair,
        grpc.aio.insecure_channel(pair.address) as channel,
    ):
        peer = peers.Peer(kv.WorkerRef(), channel, pair.link, "", 16, OpenTransfers())
        peer.is_unfit = unfit.append
        outgoing = pair.open(transfer_id := pair.grant([5]))
        outgoing.push([3], 0, 0, NUM_LAYERS)
        if code is grpc.StatusCode.OK:
            assert await peer.commit(transfer_id, outgoing) == await outgoing.finish()
        else:
            with pytest.raises(grpc.aio.AioRpcError, match="so it is") as refused:
                await peer.commit(transfer_id, outgoing)
            assert refused.value.code() is code
        assert len(unfit) == (code is grpc.StatusCode.DATA_LOSS)
        await pair.receiver.commit(transfer_id, await outgoing.finish())


def claim_of(transfer_id: bytes, manifest: Manifest) -> kv.CommitRequest:
    return kv.CommitRequest(
        transfer_id=transfer_id,
        num_chunks=manifest.num_chunks,
        num_bytes=manifest.num_bytes,
        digest=manifest.digest,
    )


class Commits:
    """How commits came to the workers of this process, and what becomes of those that come over a socket."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_calls, self.from_socket = 0, []
        call, socket = KvTransferServicer.Commit, KvTransferServicer.commit_from_socket

        async def called(servicer, message, context):
            self.num_calls += 1
            return await call(servicer, message, context)

        def came(servicer, message, tell):
            self.from_socket.append(message)
            self.on_commit(lambda: socket(servicer, message, tell))

        monkeypatch.setattr(KvTransferServicer, "Commit", called)
        monkeypatch.setattr(KvTransferServicer, "commit_from_socket", came)

    def on_commit(self, take: Callable[[], None]) -> None:
        take()


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Commits:
    return Commits(monkeypatch)


@asynccontextmanager
async def expecting(tiny, commits: Commits, num_requests: int = 4) -> AsyncIterator[tuple[Service, Callable]]:
    """A service over nixl, and what generates some answers and compares them; nothing is left in the end."""
    asked = [request(list(range(9 * i, 9 * i + 30 + 37 * i)), 24, ignore_eos=True) for i in range(num_requests)]
    async with service(tiny, engine=ENGINE, transport="local") as s:
        expected = [(await s.generate(one)).token_ids for one in asked]
    commits.num_calls = 0
    async with service(tiny, engine=ENGINE, transport="nixl") as s:

        async def compare() -> list:
            answers = await asyncio.gather(*map(s.generate, asked))
            assert [answer.token_ids for answer in answers] == expected
            return answers

        yield s, compare
        await s.settle()


@needs_nixl
async def test_no_call_is_needed(tiny, commits: Commits):
    async with expecting(tiny, commits) as (_, compare):
        await compare()
        assert (commits.num_calls, len(commits.from_socket)) == (0, 4)


@needs_nixl
async def test_the_engines_thread_sends_it(tiny, commits: Commits, monkeypatch: pytest.MonkeyPatch):
    """The loop of the prefill worker, which is busy, has not heard of the first token yet."""
    threads: list[str] = []
    post = peers.Peer.post_commit

    def posted(*args) -> None:
        threads.append(threading.current_thread().name)
        post(*args)

    async with expecting(tiny, commits) as (_, compare):
        monkeypatch.setattr(peers.Peer, "post_commit", posted)
        await compare()
    assert threads.count("engine") == len(threads) / 2 == 4  # the loop's comes to nothing


@needs_nixl
async def test_a_lost_answer_is_asked_for(tiny, commits: Commits, monkeypatch: pytest.MonkeyPatch):
    """Adopted once, whoever is told of it how often."""
    answer = _Link.answer

    def silent(link, transfer_id, one):
        if isinstance(one, Ack):
            answer(link, transfer_id, one)

    monkeypatch.setattr(_Link, "answer", silent)
    monkeypatch.setattr(peers, "COMMIT_PATIENCE_S", 0.05)
    async with expecting(tiny, commits) as (_, compare):
        assert not any(answer.timings.retries for answer in await compare())
        assert (commits.num_calls, len(commits.from_socket)) == (4, 4)


@needs_nixl
@pytest.mark.parametrize("taken", [True, False])
async def test_a_socket_that_dies_at_commit_costs_nothing(tiny, commits: Commits, taken: bool, monkeypatch):
    """Before or after the commit was taken: the call finds the transfer verified, or the run adopted."""
    async with expecting(tiny, commits, 1) as (_s, compare):

        def die(take: Callable[[], None]) -> None:
            monkeypatch.setattr(_Link, "answer", lambda *args: None)  # the loop could be faster than the end
            if taken:
                take()
            raise OSError("the socket has died")

        commits.on_commit = die  # type: ignore[method-assign]
        assert not (await compare())[0].timings.retries
        assert (commits.num_calls, len(commits.from_socket)) == (1, 1)
        commits.on_commit = lambda take: take()  # type: ignore[method-assign]
        await compare()  # without a socket
        assert (commits.num_calls, len(commits.from_socket)) == (2, 1)


@needs_nixl
async def test_what_does_not_fit_a_packet_goes_as_a_call(tiny, commits: Commits, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(control_link, "MAX_PACKET_BYTES", 128)
    async with expecting(tiny, commits) as (_, compare):
        await compare()
        assert (commits.num_calls, len(commits.from_socket)) == (4, 0)


@needs_nixl
async def test_repeated_forged_and_late_commits(tiny, commits: Commits):
    async with expecting(tiny, commits, 1) as (s, compare):
        await compare()
        (done,) = commits.from_socket
        raw = Raw(s.worker("decode")._transports._control.name)  # type: ignore[union-attr]
        raw.say(commit_frame(done.transfer_id, done.SerializeToString()))
        assert await hear(raw) == (done.transfer_id, Answer(0))
        for forged in (b"forged forged!!!", bytes(16)):
            claim = claim_of(forged, Manifest(0, 0, b""))
            raw.say(commit_frame(forged, claim.SerializeToString()))
            heard = await hear(raw)
            assert heard is not None and heard[0] == forged
            assert isinstance(heard[1], Answer) and heard[1].code == NOT_FOUND
        raw.socket.close()


@needs_nixl
@pytest.mark.parametrize("is_late", [True, False])
async def test_a_request_cancelled_while_its_commit_is_on_the_way(tiny, commits: Commits, is_late: bool):
    async with expecting(tiny, commits, 1) as (s, compare):
        held: list[Callable[[], None]] = []
        decoder = s.worker("decode")._decoder
        commits.on_commit = held.append  # type: ignore[method-assign]
        call = s.stub.GenerateStream(request(list(range(90)), 24, ignore_eos=True))
        async with asyncio.timeout(10):
            while not held:
                await asyncio.sleep(0.01)
        if not is_late:
            held[0]()
        (run,) = decoder.runs
        call.cancel()
        await s.settle()
        with contextlib.nullcontext() if run.adopting else pytest.raises(KeyError):  # found a moment before it ended
            decoder.begin_adoption(run, [FirstToken(1, False)])
        if is_late:
            held[0]()
        commits.on_commit = lambda take: take()  # type: ignore[method-assign]
        await compare()


def be_late(s: Service, busy_s: float) -> threading.Event:
    """The decode worker's event loop hears of a commit so much later. Set when it has been told."""
    servicer, told = s.worker("decode")._kv, threading.Event()
    loop = servicer._loop

    def call_soon_threadsafe(begin: Callable[[], None]) -> None:
        loop.call_soon_threadsafe(loop.call_later, busy_s, begin)
        told.set()

    servicer._loop = SimpleNamespace(call_soon=loop.call_soon, call_soon_threadsafe=call_soon_threadsafe)  # type: ignore[assignment]
    return told


@needs_nixl
async def test_adopted_is_said_first_though_the_engine_was_faster(
    tiny, commits: Commits, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    put = Outbox.put

    def queued(outbox: Outbox, entry) -> None:
        said.append(entry.WhichOneof("event") or "tokens")
        put(outbox, entry)

    async with expecting(tiny, commits, 1) as (s, compare):
        be_late(s, 0.1)
        engine = s.worker("decode").engine
        assert engine is not None
        adopt, askers = engine.adopt, []
        engine.adopt = lambda *args: askers.append(threading.current_thread().name) or adopt(*args)  # type: ignore
        monkeypatch.setattr(Outbox, "put", queued)
        await compare()
    assert askers == ["kv-control"]
    assert said[0] == "adopted" and said.count("adopted") == 1 and len(said) > 2


@needs_nixl
async def test_a_run_that_ends_before_the_loop_hears_of_its_adoption_was_adopted(
    tiny, commits: Commits, monkeypatch: pytest.MonkeyPatch
):
    """Its first step gave its last token."""
    answers: list[Answer] = []
    judge = kv_service._answer
    async with expecting(tiny, commits, 1) as (s, _):
        be_late(s, 0.3)
        monkeypatch.setattr(kv_service, "_answer", lambda task: answers.append(judge(task)) or answers[-1])
        await s.generate(request(list(range(90)), 2, ignore_eos=True))
        async with asyncio.timeout(10):
            while not answers:
                await asyncio.sleep(0.01)
    assert answers == [Answer(0)]


async def test_adopted_is_said_first_though_the_asking_thread_stands_still():
    """The engine has begun, and the thread that asked it has not come back from asking."""
    loop, said = asyncio.get_running_loop(), list[str]()
    heard = threading.Event()

    def adopt(*args) -> Future[None]:
        loop.call_soon_threadsafe(lambda: (decoder._on_event(run, Preempted("r", 0)), heard.set()))
        heard.wait(0.2)
        return Future()

    decoder = Decoder(SimpleNamespace(adopt=adopt), Dispatcher(loop), SimpleNamespace())  # type: ignore[arg-type]
    asked = Request("r", (1, 2), 2, SamplingParams(max_tokens=4))
    run = Run("r", 1, asked, None, lambda entry: said.append(entry.WhichOneof("event") or ""), RunState.GRANTED)
    await asyncio.to_thread(decoder.begin_adoption, run, [FirstToken(1, False)])
    await asyncio.to_thread(heard.wait, 10)
    assert said == ["adopted", "preempted"]


async def test_a_lease_that_is_over_by_its_commit_fails_nothing():
    """The receiver forgets a ticket that it has adopted, and says so to a heartbeat on its way."""
    failures: list[HandoffFailed] = []
    posted: list[tuple] = []
    asked = Request("r", (1, 2), 2, SamplingParams(max_tokens=4))
    none = SimpleNamespace()
    handoff = Handoff(none, none, asked, ("r", 1), kv.WorkerRef(), None, failures.append)  # type: ignore[arg-type]
    handoff._peer = SimpleNamespace(post_commit=lambda *args: posted.append(args))  # type: ignore[assignment]
    handoff._outgoing = SimpleNamespace()  # type: ignore[assignment]
    handoff.sampled(Token("r", 0, 0, 7, None, None))
    handoff._lease_lost()
    assert len(posted) == 1 and not failures


@needs_nixl
async def test_a_request_cancelled_between_adoption_and_its_word(tiny, commits: Commits):
    """The engine has been asked to adopt, the loop knows nothing of it and ends the run: it is as if it had."""
    async with expecting(tiny, commits, 1) as (s, compare):
        told = be_late(s, 0.5)
        call = s.stub.GenerateStream(request(list(range(90)), 100, ignore_eos=True))
        assert await asyncio.to_thread(told.wait, 10)
        call.cancel()
        await s.settle()
        await compare()


@needs_nixl
async def test_a_commit_before_its_chunks_waits_and_fails(tiny, commits: Commits):
    """A peer with code of its own, which has a ticket: nothing is adopted, and its run is told to try again."""
    async with expecting(tiny, commits, 1) as (s, compare):
        receiver = s.worker("decode")._receiver
        receiver.progress_s = 0.3
        num_seen = 0

        def early(take: Callable[[], None]) -> None:
            nonlocal num_seen
            num_seen += 1
            if num_seen == 1:
                commits.from_socket[0].num_chunks += 1
            take()

        commits.on_commit = early  # type: ignore[method-assign]
        (answer,) = await compare()
        assert answer.timings.retries == 1


@pytest.mark.parametrize("transport", [pytest.param("nixl", marks=needs_nixl), pytest.param("cuda_ipc", marks=GPU)])
async def test_a_decode_worker_killed_by_its_commit(checkpoint: Path, transport: str):
    """Between the commit and its answer: the prefill worker keeps nothing, and the run goes to the next one."""
    asked = request(list(range(40)), 24, ignore_eos=True)
    async with service(checkpoint, engine={**SIZES, "device": "cpu"}, transport="local") as s:
        expected = (await s.generate(asked)).token_ids
    async with chats(checkpoint, transport, dies_at_commit=True) as s:
        asking = asyncio.create_task(collect(s.stub.GenerateStream(asked, timeout=60)))
        assert await asyncio.wait_for(s.workers["decode"].ended(), 30) == 1
        await s.nothing_left("prefill")
        await s.start("decode")
        s.tell()
        with contextlib.suppress(grpc.aio.AioRpcError):  # unless the router had given up by then
            assert (await asking).token_ids == expected
        assert (await collect(s.stub.GenerateStream(asked, timeout=60))).token_ids == expected
        await s.nothing_left("decode")
        await s.nothing_left("prefill")
