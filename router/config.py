"""What one router is told: names, addresses, limits, patience. Checked on construction."""

import math
from dataclasses import dataclass, field, fields

from protos import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for; the validator uses these numbers and GetServerInfo shows them."""

    max_num_sequences: int = 16
    max_logprobs: int = 20
    max_stop_strings: int = 16
    max_stop_token_ids: int = 64
    max_batch_requests: int = 256
    max_request_bytes: int = 4 * 1024 * 1024
    max_logit_bias_entries: int = 300
    max_queued_requests: int = 1024  # in flight on this router, running ones included

    def __post_init__(self) -> None:
        for f in fields(self):
            lowest = 0 if f.name == "max_logprobs" else 1
            _check(f.name, getattr(self, f.name), lowest, 2**31 - 1)

    def to_pb(self) -> pb.Limits:
        return pb.Limits(**{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Raises ValueError that names the field, its value and what is allowed."""

    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    router_id: str = "router-0"
    limits: Limits = field(default_factory=Limits)
    max_attempts: int = 3  # per request, the first included; refusals of draining or full workers do not count
    start_wait_s: float = 15.0  # a request waits this long for workers that are starting or being restarted
    retry_wait_s: float = 15.0  # a retry waits this long for a healthy worker
    grant_wait_s: float = (
        1.0  # a run waits this long for a decode worker's pages before it tries another; then twice it
    )
    progress_s: float = 30.0  # longest silence of an attempt while its workers' engines do not step, or hand KV over
    max_silence_s: float = 600.0  # longest silence at all: a run may be queued or preempted while others go on
    worker_silence_s: float = 5.0  # a worker sends its load at least every two seconds
    load_interval_s: float = 0.1  # how often a busy worker may send it
    max_run_s: float = 3600.0  # deadline of requests that bring none, and the longest one may bring
    max_buffered_tokens: int = 8192  # tokens a client may lag behind before its request is ended
    affinity_tokens: int = 32  # prompts that share so many first tokens prefer the same workers
    prefill_slack_tokens: int = 2048  # queued prompt tokens a preferred prefill worker may have above the least loaded
    decode_slack_sequences: int = 4  # the same for decode workers, in sequences

    def __post_init__(self) -> None:
        for name in ("served_model_name", "host", "router_id"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; it needs at least one character")
        _check("port", self.port, 0, 65535)
        _check("max_attempts", self.max_attempts, 1, 16)
        _check("start_wait_s", self.start_wait_s, 0, 600)
        _check("retry_wait_s", self.retry_wait_s, 0, 600)
        for name in ("grant_wait_s", "progress_s", "max_silence_s", "worker_silence_s", "load_interval_s", "max_run_s"):
            _check(name, getattr(self, name), 0.01, 86400)
        _check("max_buffered_tokens", self.max_buffered_tokens, 16, 2**24)
        _check("affinity_tokens", self.affinity_tokens, 1, 4096)
        _check("prefill_slack_tokens", self.prefill_slack_tokens, 0, 2**31 - 1)
        _check("decode_slack_sequences", self.decode_slack_sequences, 0, 2**31 - 1)


def _check(name: str, value: float, lowest: float, highest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a number within [{lowest}, {highest}]")
    if not lowest <= value <= highest:
        raise ValueError(f"{name} is {value}; allowed is [{lowest}, {highest}]")
