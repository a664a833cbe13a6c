"""DecodeService: one stream per router, with all of its runs.

Life of a request here
1. Expect announces the run: it holds nothing yet (or, without a source, its prompt goes to the engine at once).
2. The prefill worker reserves, pushes and commits through KvTransferService (kv_service.py).
3. Adopted goes up, then its tokens: one message per engine step for all runs of the session.
4. The last token carries finish_info; Cancel, deadline, an expired lease or a broken session end it earlier.
"""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc

from decode_worker.decoder import Decoder
from decode_worker.runs import Run
from protos import worker_pb2, worker_pb2_grpc

# A router reads always; one this far behind is stuck, and its runs would fill this worker's memory.
MAX_UNSENT_ENTRIES = 65536
_log = logging.getLogger(__name__)


class Outbox:
    """Entries for one router; those queued since the stream last woke up, so all of a step's, become one message."""

    def __init__(self) -> None:
        self._entries: list[worker_pb2.StepEntry] = []
        self._ready = asyncio.Event()
        self.closed = False

    def put(self, entry: worker_pb2.StepEntry) -> None:
        """Entries of a session that is over are dropped; too many unread ones end it."""
        if self.closed:
            return
        self._entries.append(entry)
        if len(self._entries) > MAX_UNSENT_ENTRIES:
            self.close()
        self._ready.set()

    def close(self) -> None:
        self.closed = True
        self._ready.set()

    async def take(self) -> list[worker_pb2.StepEntry]:
        """Waits for entries; empty once closed."""
        await self._ready.wait()
        self._ready.clear()
        entries, self._entries = self._entries, []
        return [] if self.closed else entries


class DecodeServicer(worker_pb2_grpc.DecodeServiceServicer):
    def __init__(self, decoder: Decoder):
        self._decoder = decoder

    async def Session(
        self, commands: AsyncIterator[worker_pb2.SessionCommand], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.SessionStep]:
        outbox = Outbox()
        reading = asyncio.create_task(self._read(commands, outbox))
        step = 0
        try:
            while entries := await outbox.take():
                yield worker_pb2.SessionStep(step=step, entries=entries)
                step += 1
        finally:
            outbox.close()
            reading.cancel()
            for run in self._decoder.runs:
                if _belongs(run, outbox):
                    self._decoder.end(run)

    async def _read(self, commands: AsyncIterator[worker_pb2.SessionCommand], outbox: Outbox) -> None:
        """Until the router closes or the stream breaks; either way the session is over."""
        try:
            async for command in commands:
                match command.WhichOneof("command"):
                    case "expect":
                        await self._decoder.expect(command.expect, outbox.put)
                    case "cancel":
                        await self._decoder.cancel(
                            command.cancel.run_id, command.cancel.attempt, command.cancel.is_finished
                        )
        except Exception:  # the session ends, and its runs with it: say why
            _log.exception("a command of the session failed")
        finally:
            outbox.close()


def _belongs(run: Run, outbox: Outbox) -> bool:
    return getattr(run.emit, "__self__", None) is outbox
