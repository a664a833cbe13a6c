"""What this engine can ever take: a request against model and pool. Constants only, so any thread may ask."""

from collections.abc import Collection
from dataclasses import dataclass

from engine.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """The check_ methods raise ValueError naming field, value and allowed range."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    block_size: int

    def check_submit(self, request: Request) -> None:
        """For a request that runs here to its end."""
        self._check_request(request)
        total = min(request.num_prompt_tokens + request.sampling.max_tokens, self.max_model_len)
        self._check_fits(max(total - 1, len(request.token_ids)), 0, f"{total} tokens")

    def check_sink(self, request: Request) -> None:
        """For a prompt that leaves after its first tokens."""
        self._check_request(request)
        self._check_fits(len(request.token_ids), 0, f"{len(request.token_ids)} tokens")

    def check_reserve(self, request: Request, num_tokens: int) -> None:
        """For pages that another worker fills, and the run that then goes on in them to its end."""
        self._check_request(request)
        if not len(request.token_ids) <= num_tokens < self.max_model_len:
            raise ValueError(f"num_tokens: {num_tokens} is not in [{len(request.token_ids)}, {self.max_model_len - 1}]")
        n = request.sampling.num_sequences
        self._check_fits(num_tokens, num_growth_blocks(n, num_tokens, self.block_size), f"{num_tokens} tokens x {n}")
        total = min(request.num_prompt_tokens + request.sampling.max_tokens, self.max_model_len)
        self._check_fits(max(total - 1, num_tokens), 0, f"{total} tokens")

    def _check_fits(self, num_tokens: int, extra: int, what: str) -> None:
        needed = -(-num_tokens // self.block_size) + extra
        if needed > self.num_blocks:
            raise ValueError(f"token_ids: {what} need {needed} KV blocks, which is not in [1, {self.num_blocks}]")

    def _check_request(self, request: Request) -> None:
        length, sampling, longest = len(request.token_ids), request.sampling, self.max_model_len - 1
        if not 1 <= length <= longest:
            raise ValueError(f"token_ids: {length} tokens is not in [1, {longest}] (max_model_len - 1)")
        if not 1 <= request.num_prompt_tokens <= length:
            raise ValueError(f"num_prompt_tokens: {request.num_prompt_tokens} is not in [1, {length}]")
        self._check_ids("token_ids", request.token_ids)
        self._check_ids("logit_bias", sampling.logit_bias)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        num_output = length - request.num_prompt_tokens
        if num_output >= sampling.max_tokens:
            raise ValueError(f"max_tokens: {sampling.max_tokens} is not above the {num_output} output tokens there are")
        if num_output and sampling.num_sequences > 1:
            raise ValueError(f"num_sequences: {sampling.num_sequences} is not 1, and token_ids already hold output")
        if sampling.num_sequences > self.max_num_seqs:
            raise ValueError(f"num_sequences: {sampling.num_sequences} is not in [1, {self.max_num_seqs}]")

    def _check_ids(self, name: str, token_ids: Collection[int]) -> None:
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            return
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
        raise ValueError(f"{name}: token id {wrong} is not in [0, {self.vocab_size - 1}]")


def num_growth_blocks(num_sequences: int, num_tokens: int, block_size: int) -> int:
    """Blocks beyond a prompt's own: the first generated token's, and each fork's private tail."""
    return num_sequences - 1 if num_tokens % block_size else num_sequences
