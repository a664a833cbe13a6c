"""Pages that a one-sided writer of another host may still write to come back when it cannot any more, and only then."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest

from cluster import doctor, show
from cluster.fencing import Fencing
from decode_worker import fencing, kv_service
from kv_transfer import locality, nixl
from kv_transfer.base import TransferRefused
from kv_transfer.open_transfers import OpenTransfers
from protos import kv_transfer_pb2 as kv
from protos import kv_transfer_pb2_grpc as kv_grpc
from tests.service import request, service
from tests.transfer import needs_nixl
from tests.worker_process import WorkerProcess, serving

SMALL = {"load_format": "dummy", "num_blocks": 128, "max_num_batched_tokens": 16, "num_threads": 1}


async def until(holds: Callable[[], Any], within_s: float = 20.0) -> Any:
    async with asyncio.timeout(within_s):
        while not (result := holds()):
            await asyncio.sleep(0.02)
        return result


def test_a_process_is_ended_by_its_name_only():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    name = f"{locality.process().rpartition(':')[0].rpartition(':')[0]}:{child.pid}:{locality._started(child.pid)}"
    elsewhere = f"another boot/pid:[1]:{child.pid}:1"
    assert not locality.end(elsewhere, 1.0) and not locality.is_here(elsewhere)
    assert locality.end(name.rpartition(":")[0] + ":1", 1.0)  # an earlier owner of the pid is gone, this one is not his
    assert child.poll() is None and not locality.is_gone(name)
    child.send_signal(signal.SIGSTOP)
    assert locality.end(name, 5.0) and locality.end(name, 5.0)
    assert child.wait(5) == -signal.SIGKILL


class Open:
    """An Outgoing that a test closes."""

    def __init__(self) -> None:
        self.aborted, self.close = "", lambda _: None

    def abort(self, reason: str) -> None:
        self.aborted = reason

    def add_closed_callback(self, callback) -> None:
        self.close = callback


def test_a_disowned_ticket_is_never_used():
    transfers, outgoing = OpenTransfers(), Open()
    assert transfers.add(b"open", lambda: outgoing) is outgoing  # type: ignore[arg-type, return-value]
    assert transfers.disown([b"open", b"lost"]) == [b"open"] and "gave the ticket up" in outgoing.aborted
    with pytest.raises(TransferRefused, match="gave the ticket up"):
        transfers.add(b"lost", Open)  # type: ignore[arg-type]
    outgoing.close(outgoing)
    assert transfers.disown([b"open"]) == [] and len(transfers) == 0


@needs_nixl
async def test_a_grant_whose_answer_was_lost_is_asked_for(tiny, monkeypatch: pytest.MonkeyPatch):
    """The writer lives and is well, but has never heard of the ticket: nobody would ever fence it."""
    monkeypatch.setattr(kv_service, "LEASE_S", 0.5)
    monkeypatch.setattr(fencing, "ASK_AFTER_S", 1.5)  # two looks, so that it is seen to wait
    async with service(tiny, engine=SMALL, transport="nixl") as s:
        decode, asked = s.worker("decode"), kv.CanaryRequest(source=s.worker("prefill").me, num_blocks=4)
        asked.transport, asked.block_size = "nixl", 16
        async with grpc.aio.insecure_channel(decode.address) as channel:
            granted = await kv_grpc.KvTransferServiceStub(channel).Canary(asked, timeout=5)
        waiting = await until(lambda: decode.status()["silent_writers"])
        assert waiting[0]["worker_id"] == "prefill-0" and waiting[0]["num_tickets"] == 1
        await until(lambda: decode.status()["quarantined_blocks"] == 4)
        await s.settle()
        assert decode.status()["silent_writers"] == [] and decode.status()["tickets_quarantined"] == 1
        with pytest.raises(TransferRefused):  # had the answer only been late
            s.worker("prefill")._peers.transfers.add(granted.transfer_id, Open)  # type: ignore[arg-type]


@needs_nixl
async def test_a_question_to_another_incarnation_is_refused(tiny):
    async with service(tiny, engine=SMALL, transport="nixl") as s:
        prefill = s.worker("prefill")
        stranger = kv.WorkerRef(worker_id="prefill-0", incarnation="of another life")
        async with grpc.aio.insecure_channel(prefill.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="this is prefill-0") as refused:
                await kv_grpc.KvTransferServiceStub(channel).Fence(kv.FenceRequest(target=stranger), timeout=5)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION


@needs_nixl
async def test_a_writer_in_the_middle_of_a_write_says_so(tiny, monkeypatch: pytest.MonkeyPatch):
    """Cancelled while NIXL writes: the pages wait as long as the write does, and the writer is asked meanwhile."""
    gate, begun = threading.Event(), threading.Event()
    wait = nixl._Write.wait

    def slow(write) -> int:
        begun.set()
        assert gate.wait(20)
        return wait(write)

    monkeypatch.setattr(nixl._Write, "wait", slow)
    monkeypatch.setattr(fencing, "ASK_AFTER_S", 0.2)
    async with service(tiny, engine=SMALL, transport="nixl") as s:
        decode = s.worker("decode")
        call = s.stub.GenerateStream(request(list(range(300)), 8, ignore_eos=True))
        await asyncio.to_thread(begun.wait, 20)
        call.cancel()
        await until(lambda: any(one["age_s"] > 2.5 for one in decode.status()["silent_writers"]))
        assert decode.status()["quarantined_blocks"] == -(-300 // 16)
        gate.set()
        await s.settle()
        assert decode.status()["silent_writers"] == []


@asynccontextmanager
async def two_hosts(model) -> AsyncIterator[tuple[Any, WorkerProcess, WorkerProcess]]:
    """A router's stub, and a prefill and a decode worker in processes that take themselves to be on two hosts."""
    workers = await asyncio.gather(
        *(
            WorkerProcess.start(role, str(model), "nixl", SMALL, host=f"the host of {role}")
            for role in ("prefill", "decode")
        )
    )
    async with serving(model, *workers) as stub:
        yield stub, *workers


@needs_nixl
@pytest.mark.parametrize("end", ["slow", "killed"])
async def test_a_writer_that_stops_in_the_middle(tiny, end: str):
    """Stopped while it pushes, its client gone: the pages wait for it. It fences when it goes on; or it is killed,
    which the decode worker cannot see from another host: it believes the controller only."""
    async with two_hosts(tiny) as (stub, prefill, decode):
        call = stub.GenerateStream(request(list(range(1500)), 8, ignore_eos=True))
        await decode.status_where(lambda status: status["kv_bytes_received"])
        prefill.signal(signal.SIGSTOP)
        call.cancel()
        waiting = await decode.status_where(lambda s: any(one["age_s"] > 5 for one in s["silent_writers"]))
        assert waiting["quarantined_blocks"] == -(-1500 // 16) == waiting["total_blocks"] - waiting["free_blocks"]
        if end == "slow":
            prefill.signal(signal.SIGCONT)
        else:
            prefill.signal(signal.SIGKILL)
            await asyncio.sleep(3)
            assert (await decode.ask("status"))["quarantined_blocks"] == waiting["quarantined_blocks"]
            await decode.ask(f"ended prefill-0 {prefill.member.incarnation}")
        left = await decode.status_where(lambda status: not status["quarantined_blocks"])
        assert left["free_blocks"] == left["total_blocks"] and not left["num_runs"]
        assert left["tickets_quarantined"] == 1 and not left["silent_writers"]
        await decode.ask("check")


class Controller:
    """Fencing among supervisors that a test has made up."""

    def __init__(self, ended: bool | None = True) -> None:
        self.ended: list[tuple[str, str]] = []
        self.condemned: list[str] = []
        self.asked: list[str] = []
        self.answer = ended
        remote = SimpleNamespace(writer_ended=SimpleNamespace(remote=self._told))
        self.supervisors = {
            name: SimpleNamespace(
                member=SimpleNamespace(incarnation=f"{name} now", address="here"),
                handle=remote,
                condemn=self.condemned.append,
            )
            for name in ("prefill-0", "decode-0")
        }
        self.tasks: list[asyncio.Task] = []
        spawn = lambda task: self.tasks.append(asyncio.ensure_future(task))  # noqa: E731
        self.fencing = Fencing(self.supervisors, 30.0, spawn, self._end)  # type: ignore[arg-type]

    async def report(
        self, incarnation: str, age_s: float, worker_id: str = "prefill-0", process: str = "a/b:1:2"
    ) -> None:
        writer = {"worker_id": worker_id, "incarnation": incarnation, "process": process, "age_s": age_s}
        self.fencing.look({"silent_writers": [writer]})
        await asyncio.gather(*self.tasks)

    async def _end(self, process: str) -> bool | None:
        self.asked.append(process)
        return self.answer

    async def _told(self, worker_id: str, incarnation: str) -> None:
        self.ended.append((worker_id, incarnation))


async def test_a_member_gets_its_time_and_no_more():
    controller = Controller()
    await controller.report("prefill-0 now", 29.0)
    assert not controller.asked and not controller.condemned
    await controller.report("prefill-0 now", 31.0)
    assert len(controller.condemned) == 1 == controller.fencing.num_killed and controller.asked == ["a/b:1:2"]
    assert controller.ended == [("prefill-0", "prefill-0 now")] * 2  # everybody hears


async def test_who_has_left_gets_none():
    controller = Controller()
    for worker_id in ("prefill-0", "prefill-7"):
        await controller.report("an earlier life", 1.0, worker_id)
    assert not controller.condemned and controller.fencing.num_killed == 0
    assert controller.ended == [("prefill-0", "an earlier life")] * 2 + [("prefill-7", "an earlier life")] * 2


async def test_a_process_that_does_not_know_its_host_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    controller = Controller()
    monkeypatch.setattr(locality, "host", str)
    for process in ("", locality.process()):
        await controller.report("an earlier life", 1000.0, process=process)
        assert not locality.is_gone(process) and not locality.is_here(process)
    assert not controller.asked and not controller.ended


async def test_pages_are_not_free_on_a_guess(monkeypatch: pytest.MonkeyPatch):
    controller = Controller(ended=False)
    await controller.report("an earlier life", 100.0)
    assert not controller.ended  # the node answers that it lives, or not at all
    controller.answer = None  # no node is on its host any more
    await controller.report("an earlier life", 100.0)
    assert not controller.ended
    monkeypatch.setattr("cluster.fencing.HOST_LOST_S", 0.0)
    await controller.report("an earlier life", 100.0)
    assert controller.ended and len(controller.asked) == 3


def test_status_and_doctor_name_who_is_waited_for():
    writer = {"worker_id": "prefill-1", "incarnation": "0123456789abcdef", "process": "a/b:1:2", "age_s": 12.3}
    report = {"silent_writers": [writer], "quarantined_blocks": 7, "transfers_corrupt": 2}
    worker = {"id": "decode-0", "report": report, "detail": "", "last_error": "", "state": "ready"}
    status: dict[str, Any] = {
        "pools": {"decode": {"role": "decode", "target": 1, "ready": 1, "workers": [worker]}},
        "controller": {"writers_killed": 3},
    }
    assert [line.plain for line in show._links(status)] == [
        "decode-0: 2 transfers were corrupt",
        "decode-0: 7 blocks wait for prefill-1 (01234567), silent for 12 s",
    ]
    found = doctor._writers(status)
    assert not found.ok and found.said == "decode-0 waits for prefill-1 (01234567), silent for 12 s"
    report["silent_writers"] = []
    assert doctor._writers(status) == doctor.Finding("writes are fenced", True, "3 workers were killed for theirs")
