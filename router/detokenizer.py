"""Token ids to text, one token at a time, in O(1) per token and never with half a code point.

Tokenizers of today's models spell text in bytes: byte-level BPE (GPT-2, Llama 3, Qwen) writes each byte as one stand-in
character, SentencePiece with byte fallback (Llama 2, Mistral, Gemma) has <0xNN> tokens for what its pieces lack. For
both, a token is a fixed byte string, and a stream is an incremental UTF-8 decoder over them. Any other decoder goes
through a sliding window of the last tokens.

What the pushes and the flush of one Detokenizer return concatenates to the tokenizer's decode(ids,
skip_special_tokens=True). One exception: in a malformed run of fallback bytes the tokenizer replaces the whole run, and
here the code points that were complete stay.
"""

import codecs
import json
import re
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Vocabulary:
    """Token id -> bytes, filled as ids are seen; shared by all detokenizers of a tokenizer."""

    def __init__(self, fast: FastTokenizer):
        self.fast = fast
        self.special_ids = frozenset(i for i, t in fast.get_added_tokens_decoder().items() if t.special)
        decoder = json.loads(fast.decoder.__getstate__()) if fast.decoder is not None else None
        self._spell, self.strip_left = _speller(decoder)
        self._bytes: dict[int, bytes] = {}
        # A character is at least one byte, and a byte-level token spells as many bytes as it has characters.
        longest = max(map(len, fast.get_vocab()), default=0)
        self.max_token_chars = longest if self._spell is _byte_level else 0  # 0: no bound is known

    @property
    def is_bytes(self) -> bool:
        """Whether each token is a fixed byte string; else only whole windows can be decoded."""
        return self._spell is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, special tokens spelled out; b"" for an id the tokenizer lacks."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self.fast.id_to_token(token_id)
            if token is None:
                found = b""
            elif self._spell is None or token_id in self.special_ids:
                found = token.encode()
            else:
                found = self._spell(token)
            self._bytes[token_id] = found
        return found


class Detokenizer:
    """One sequence's text so far. Special tokens are skipped."""

    __slots__ = ("_pending", "_strip", "_vocabulary", "_window", "_window_read")

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._pending = b""  # a code point's first bytes
        self._strip = vocabulary.strip_left  # spaces still to drop at the very start
        self._window: list[int] = []  # the last emitted tokens, then those not emitted yet
        self._window_read = 0  # where the latter begin

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a code point is open."""
        vocabulary = self._vocabulary
        if token_id in vocabulary.special_ids:
            return ""
        if not vocabulary.is_bytes:
            return self._push_window(token_id)
        data = vocabulary.token_bytes(token_id)
        if self._strip:
            data = self._strip_left(data)
        if self._pending:
            data = self._pending + data
        text, num_read = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[num_read:]
        return text

    def flush(self) -> str:
        """The end: what an open code point comes to (U+FFFD)."""
        if not self._vocabulary.is_bytes:
            return self._emit_window(at_end=True)
        data, self._pending = self._pending, b""
        return data.decode("utf-8", "replace")

    def _strip_left(self, data: bytes) -> bytes:
        spaces = len(data) - len(data.lstrip(b" "))
        dropped = min(spaces, self._strip)
        self._strip = self._strip - dropped if dropped == len(data) else 0
        return data[dropped:]

    def _push_window(self, token_id: int) -> str:
        self._window.append(token_id)
        return self._emit_window(at_end=False)

    def _emit_window(self, at_end: bool) -> str:
        decode = self._vocabulary.fast.decode
        before = decode(self._window[: self._window_read], skip_special_tokens=True)
        after = decode(self._window, skip_special_tokens=True)
        if not at_end and (len(after) <= len(before) or after.endswith("\ufffd")):
            return ""
        del self._window[: self._window_read]
        self._window_read = len(self._window)
        return after[len(before) :]


def _speller(decoder: dict[str, Any] | None) -> tuple[Any, int]:
    """(token string -> bytes, spaces stripped at the start), or (None, 0) for decoders that are not byte strings."""
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, 0
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        pattern = steps[0]["pattern"].get("String")
        strip: dict[str, Any] = steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
        if pattern and strip["content"] == " " and strip["stop"] == 0:
            return _fallback_speller(pattern, steps[0]["content"]), int(strip["start"])
    return None, 0


def _fallback_speller(pattern: str, content: str) -> Any:
    def spell(token: str) -> bytes:
        text = token.replace(pattern, content)
        byte = _FALLBACK_BYTE.match(text)
        return bytes([int(text[3:5], 16)]) if byte else text.encode()

    return spell


def _stand_ins() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _stand_ins()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[c] for c in token])
    except KeyError:  # an added token in plain text
        return token.encode()
