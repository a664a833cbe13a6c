"""One worker as the router sees it: how a client of it ends."""

import asyncio

from protos import worker_pb2 as wpb
from router.config import RouterConfig
from router.worker_client import WorkerClient, WorkerGone


async def test_a_client_closed_while_its_connection_breaks_is_gone() -> None:
    """A task group that ends with errors of its own forgets that it was cancelled (Python 3.11)."""
    client = WorkerClient(wpb.Member(worker_id="w", address="127.0.0.1:1"), RouterConfig("m"), lambda: None)
    serving = asyncio.Event()

    async def serve_and_break() -> None:
        serving.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise WorkerGone("at the same moment") from None

    client._serve_connection = serve_and_break  # type: ignore[method-assign]
    client.start()
    await serving.wait()
    await asyncio.wait_for(client.close("it left"), 5.0)
