"""What a request's Timings are made of: when its messages went out, and what attempts before the last one cost."""

import time

from google.protobuf import duration_pb2

from protos import inference_pb2 as pb
from router.attempt import Attempt


class Record:
    """Times are time.monotonic(), None until it happened."""

    def __init__(self, received_at: float):
        self.received_at = received_at
        self.num_attempts = 0
        self._first_sent_at: float | None = None
        self._last_sent_at: float | None = None
        self._transfer_bytes = 0
        self._num_preemptions = 0

    def sent(self) -> None:
        """Tokens go out now."""
        self._last_sent_at = time.monotonic()
        self._first_sent_at = self._first_sent_at or self._last_sent_at

    def add(self, attempt: Attempt) -> None:
        """Keeps the counts of an attempt that another one follows."""
        moved = attempt.transferred
        self._transfer_bytes += moved.num_bytes if moved is not None else attempt.lost_bytes
        self._num_preemptions += attempt.num_preemptions

    def timings(self, attempt: Attempt | None) -> pb.Timings:
        """`attempt` is the last one, None if the request was aborted without or between attempts."""
        timings = pb.Timings(
            kv_transfer_bytes=self._transfer_bytes,
            retries=max(0, self.num_attempts - 1),
            preemptions=self._num_preemptions,
        )
        if attempt is not None:
            self._describe(attempt, timings)
        return timings

    def _describe(self, attempt: Attempt, timings: pb.Timings) -> None:
        route, moved = attempt.route, attempt.transferred
        prefill = route.prefill or route.decode
        timings.preemptions += attempt.num_preemptions
        timings.local_prefill = attempt.is_local
        timings.returned_tokens = attempt.returned_tokens
        timings.prefill_worker = prefill.worker_id if prefill is not None else ""
        if route.decode is not None and (attempt.adopted_at is not None or attempt.is_local):
            timings.decode_worker = route.decode.worker_id
        if moved is not None:
            timings.kv_transfer_bytes += moved.num_bytes
            timings.kv_transport = moved.transport if moved.num_bytes else ""
            timings.decode_cached_tokens = moved.cached_tokens
        spans = {
            "queue": (self.received_at, attempt.started_at),
            "prefill": (attempt.started_at, attempt.first_tokens_at),
            "kv_transfer": (None if attempt.is_local else attempt.first_tokens_at, attempt.adopted_at),
            "decode_queue": (attempt.adopted_at, attempt.decoded_at),
            "time_to_first_token": (self.received_at, self._first_sent_at),
            "decode": (self._first_sent_at, self._last_sent_at),
        }
        for name, (start, end) in spans.items():
            if start is not None and end is not None:
                getattr(timings, name).CopyFrom(to_duration(max(0.0, end - start)))
        if attempt.prefill_s is not None:
            timings.prefill.CopyFrom(to_duration(attempt.prefill_s))


def to_duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
