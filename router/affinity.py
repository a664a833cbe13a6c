"""By what name a run is routed: its session's, or its prompt's first tokens. Workers' prefix caches follow from it.

A conversation must keep its name as it grows. Its first tokens are the same in every turn once there are enough;
what a shorter first turn and its answer begin with is remembered, so that the next turn goes where that one went.
"""

from collections import OrderedDict
from collections.abc import Sequence

MAX_REMEMBERED = 16384  # conversations that began so short; a few hundred bytes each


def affinity_key(session_id: str, token_ids: Sequence[int], num_tokens: int) -> bytes:
    """The session's name, else the prompt's first tokens."""
    if session_id:
        return b"s" + session_id.encode()
    return b"t" + b"".join(i.to_bytes(4, "little") for i in token_ids[:num_tokens])


class Affinity:
    """`num_tokens` make a name."""

    def __init__(self, num_tokens: int):
        self._num_tokens = num_tokens
        self._names: OrderedDict[bytes, bytes] = OrderedDict()  # first tokens of a grown prompt -> where it began

    def key(self, session_id: str, token_ids: Sequence[int]) -> bytes:
        own = affinity_key(session_id, token_ids, self._num_tokens)
        if own not in self._names:
            return own
        self._names.move_to_end(own)
        return self._names[own]

    def answered(self, session_id: str, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """What continues `prompt` and `answer` belongs where `prompt` went."""
        if session_id or not len(prompt) < self._num_tokens <= len(prompt) + len(answer):
            return
        grown = affinity_key("", [*prompt, *answer[: self._num_tokens]], self._num_tokens)
        self._names[grown] = affinity_key("", prompt, self._num_tokens)
        self._names.move_to_end(grown)
        if len(self._names) > MAX_REMEMBERED:
            self._names.popitem(last=False)
