"""What stub workers sample: a pure function, so that any worker, attempt or batch gives the same."""

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb


def token(seed: int, index: int, position: int) -> int:
    """Ordinary tokens of SmolLM2's vocabulary, never special ones."""
    return 100 + (seed % 9973 * 31 + index * 977 + position * 7919) % 40000


def logprob(run: wpb.EngineRequest, token_id: int) -> pb.TokenLogprob | None:
    if not run.HasField("logprobs"):
        return None
    top = [pb.TokenLogprob(token_id=token_id + i, logprob=-1.0 - i, rank=1 + i) for i in range(run.logprobs)]
    return pb.TokenLogprob(token_id=token_id, logprob=-1.0, rank=1, top=top)
