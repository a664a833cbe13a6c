"""Two engines in one process: what the workers do for a hand-off, without a transport; and a sink that does nothing."""

import threading
from collections import Counter

from engine.engine import Engine
from engine.request import FirstToken, Request
from tests.engines import Listener


class Handoff:
    """What the two workers do, in one process: A's sink reserves at B, copies bytes as they become ready, B adopts."""

    receiver = "b"

    def __init__(self, a: Engine, b: Engine, listener: Listener, request: Request):
        self.a, self.b, self.listener, self.request = a, b, listener, request
        self.owner = f"peer/{request.id}"
        self.reported: Counter[tuple[int, int]] = Counter()
        self.num_bytes = 0
        self.reservation = None
        self.calls = []

    def start(self) -> None:
        self.a.submit(self.request, self)

    def wanted(self) -> None:
        future = self.b.reserve(self.owner, self.request, len(self.request.token_ids))
        future.add_done_callback(self.granted)

    def granted(self, future) -> None:
        self.reservation = future.result()
        self.a.grant(self.request.id, self.reservation.num_cached_tokens // self.b.layout.block_size)

    def sampled(self, token) -> None:
        pass

    def ready(self, block_ids, block_start, layer_start, layer_stop, after=None) -> None:
        self.calls.append((block_start, len(block_ids), layer_start, layer_stop))
        start, stop = (self.a.layout.layer_offsets[layer] for layer in (layer_start, layer_stop))
        for i, block_id in enumerate(block_ids, start=block_start):
            self.b.slab[self.reservation.block_ids[i], start:stop] = self.a.slab[block_id, start:stop]
            self.num_bytes += stop - start
            for layer in range(layer_start, layer_stop):
                self.reported[i, layer] += 1

    def finish(self, timeout: float = 60) -> dict:
        """Waits for the first tokens, adopts at B, frees at A."""
        name, n = self.request.id, self.request.sampling.num_sequences
        self.listener.until(lambda: all((name, i) in self.listener.outputs for i in range(n)), timeout)
        first = [FirstToken(self.listener.outputs[name, i][0], (name, i) in self.listener.finished) for i in range(n)]
        bs, num_layers = self.a.layout.block_size, self.a.layout.num_layers
        blocks = range(self.reservation.num_cached_tokens // bs, -(-len(self.request.token_ids) // bs))
        assert self.reported == Counter((b, layer) for b in blocks for layer in range(num_layers))
        assert self.num_bytes == len(blocks) * self.a.layout.block_bytes
        self.b.adopt(self.owner, self.request, first).result(10)
        self.a.release(name)
        return {(name, i): [t.token_id] for i, t in enumerate(first)}


class Silent:
    """A sink that grants itself and sends nothing."""

    receiver = "nobody"

    def __init__(self, engine: Engine, fail_at: str = ""):
        self.engine, self.fail_at = engine, fail_at
        self.asked = threading.Event()

    def wanted(self) -> None:
        self.asked.set()
        if self.fail_at == "wanted":
            raise OSError("no receiver")
        if self.fail_at != "grant":
            for name in list(self.engine._sinks):
                self.engine.grant(name, 0)

    def sampled(self, token) -> None:
        pass

    def ready(self, block_ids, block_start, layer_start, layer_stop, after=None) -> None:
        if self.fail_at == "ready":
            raise OSError("broken pipe")
