"""One output sequence of a request: which tokens are committed, and which of them the client has not got yet.

    offset   0 ......... num_sent ......... len(token_ids)
             |-- client has --|-- pending --|          next token must carry offset len(token_ids)

A committed token is never resampled: a retry continues at len(token_ids). Workers' offsets are compared strictly.
"""

from collections.abc import Sequence as Items

from protos import inference_pb2 as pb
from router.detokenizer import Vocabulary
from router.errors import AttemptFailed
from router.stop import StopScanner
from router.tokenizer import Tokenizer
from router.validate import Accepted


class Sequence:
    """`accept` takes tokens from workers as they arrive; `take_delta` makes the client's next message of them.

    Text is made in `take_delta`, so a burst costs one message. `finish` is set once the sequence is over, be it by the
    worker's word or by a stop string.
    """

    __slots__ = (
        "_accepted", "_detokenizer", "_include_stop", "_logprobs", "_min_tokens", "_scanner", "_vocabulary",
        "finish", "index", "num_counted", "num_sent", "token_ids", "worker_finish",
    )  # fmt: skip

    def __init__(self, index: int, accepted: Accepted, tokenizer: Tokenizer, scanner: StopScanner | None):
        self.index = index
        self.token_ids: list[int] = []  # committed
        self.num_sent = 0
        self.worker_finish: pb.FinishInfo | None = None  # came with the last token; the text may still end earlier
        self.finish: pb.FinishInfo | None = None  # told to the client
        self._accepted = accepted
        self._vocabulary: Vocabulary = tokenizer.vocabulary
        self._scanner = scanner
        needs_text = accepted.want_text or scanner is not None
        self._detokenizer = tokenizer.detokenizer() if needs_text else None
        self._logprobs: list[pb.TokenLogprob] = []  # of pending tokens
        self._min_tokens = accepted.stopping.min_tokens
        self._include_stop = accepted.stopping.include_stop_str_in_output

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_sent

    @property
    def is_over(self) -> bool:
        """No more tokens are expected from workers."""
        return self.worker_finish is not None or self.finish is not None

    @property
    def ended_by_stop_string(self) -> bool:
        return self.finish is not None and self.finish.WhichOneof("matched_stop") == "stop_string"

    def accept(
        self, offset: int, token_ids: Items[int], logprobs: Items[pb.TokenLogprob], finish: pb.FinishInfo | None
    ) -> None:
        """Commits a worker's tokens. AttemptFailed (a bug, not retryable) on a gap, an overlap or too many."""
        if self.finish is not None:
            return  # ended by a stop string; the worker does not know yet
        if self.worker_finish is not None and (token_ids or finish is not None):
            raise _bug(f"sequence {self.index} goes on after its end at offset {len(self.token_ids)}")
        if token_ids:
            if offset != len(self.token_ids):
                raise _bug(f"sequence {self.index}: token offset {offset} where {len(self.token_ids)} comes next")
            if offset + len(token_ids) > self._accepted.stopping.max_tokens:
                raise _bug(f"sequence {self.index}: more than max_tokens {self._accepted.stopping.max_tokens}")
            if self._accepted.logprobs is not None:
                if len(logprobs) != len(token_ids):
                    raise _bug(f"sequence {self.index}: {len(logprobs)} logprobs for {len(token_ids)} tokens")
                self._logprobs.extend(logprobs)
            self.token_ids.extend(token_ids)
        if finish is not None:
            self.worker_finish = finish

    def take_delta(self) -> tuple[pb.SequenceDelta | None, pb.FinishInfo | None]:
        """What the client has not got yet, and the finish if this is the last of it."""
        if self.finish is not None or (not self.num_pending and self.worker_finish is None):
            return None, None
        start, end = self.num_sent, len(self.token_ids)
        text, end = self._text(start, end)
        accepted = self._accepted
        delta = pb.SequenceDelta(index=self.index, token_offset=start, num_tokens=end - start)
        if accepted.want_text:
            delta.text = text
        if accepted.want_token_ids:
            delta.token_ids.extend(self.token_ids[start:end])
        if accepted.logprobs is not None:
            for logprob in self._logprobs[: end - start]:
                self._spell(logprob)
                delta.logprobs.append(logprob)
            self._logprobs.clear()
        self.num_sent = end
        del self.token_ids[end:]  # sampled after the stop string: neither sent nor counted
        if self._scanner is not None and self._scanner.matched is not None:
            self._end(pb.FinishInfo(finish_reason=pb.FINISH_REASON_STOP, stop_string=self._scanner.matched))
        elif self.worker_finish is not None:
            self._end(self.worker_finish)
        return delta if delta.num_tokens or delta.text else None, self.finish

    def abort(self) -> pb.FinishInfo:
        """Ends an unfinished sequence by Abort; pending tokens are dropped."""
        del self.token_ids[self.num_sent :]
        return self._end(pb.FinishInfo(finish_reason=pb.FINISH_REASON_ABORTED))

    def _end(self, finish: pb.FinishInfo) -> pb.FinishInfo:
        self.finish = pb.FinishInfo()
        self.finish.CopyFrom(finish)
        self.finish.index = self.index
        self.finish.seed = self._accepted.sampling.seed
        return self.finish

    def _text(self, start: int, end: int) -> tuple[str, int]:
        """Text of tokens [start, end) that may go out, and where it ends if a stop string ends it earlier."""
        if self._detokenizer is None:
            return "", end
        push, scanner = self._detokenizer.push, self._scanner
        pieces = []
        for i in range(start, end):
            if self._is_silent(i):
                break
            piece = push(self.token_ids[i])
            if scanner is not None:
                piece = scanner.push(piece, may_stop=i + 1 >= self._min_tokens)
            pieces.append(piece)
            if scanner is not None and scanner.matched is not None:
                return "".join(pieces), i + 1
        if self.worker_finish is not None and end == len(self.token_ids):
            rest = self._detokenizer.flush()
            if scanner is not None:
                rest = scanner.push(rest, may_stop=end >= self._min_tokens)
                if scanner.matched is None:
                    rest += scanner.flush()
            pieces.append(rest)
        return "".join(pieces), end

    def _is_silent(self, i: int) -> bool:
        """Whether token i is the EOS or stop token that ended the sequence: it is a token of it, not text."""
        if self.worker_finish is None or i != len(self.token_ids) - 1 or self._include_stop:
            return False
        return self.worker_finish.WhichOneof("matched_stop") is not None

    def _spell(self, logprob: pb.TokenLogprob) -> None:
        logprob.token = self._vocabulary.token_bytes(logprob.token_id)
        for other in logprob.top:
            other.token = self._vocabulary.token_bytes(other.token_id)


def _bug(message: str) -> AttemptFailed:
    return AttemptFailed(pb.ERROR_REASON_INTERNAL, message, retryable=False)
