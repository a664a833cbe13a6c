"""Stop strings in a stream of text deltas: nothing that may still become a stop string leaves too early.

Each stop string runs its Knuth-Morris-Pratt automaton over the characters, so the work per character is O(1) amortised
per string, wherever deltas begin and end. The automaton's state is the number of characters to hold back.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stops:
    """The stop strings of a request with their failure tables; shared by its sequences."""

    strings: tuple[str, ...]
    include_in_output: bool
    tables: tuple[tuple[int, ...], ...]

    @classmethod
    def build(cls, strings: Sequence[str], include_in_output: bool) -> "Stops":
        unique = tuple(dict.fromkeys(strings))
        return cls(unique, include_in_output, tuple(_failure_table(s) for s in unique))


class StopScanner:
    """One sequence's progress. After a match, `matched` is the stop string and no more text comes out."""

    __slots__ = ("_held", "_states", "_stops", "matched")

    def __init__(self, stops: Stops):
        self._stops = stops
        self._states = [0] * len(stops.strings)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, may_stop: bool) -> str:
        """The text that may go out now. The match that ends first wins, of those the longest.

        With `may_stop` False (below min_tokens) a match that this text completes is passed over.
        """
        if not self._stops.strings:
            return text
        if not text or self.matched is not None:
            return ""
        text = self._held + text
        for end in range(len(self._held) + 1, len(text) + 1):
            found = self._step(text[end - 1])
            if found and may_stop:
                self.matched = found
                self._held = ""
                return text[:end] if self._stops.include_in_output else text[: end - len(found)]
        split = len(text) - max(self._states)
        self._held = text[split:]
        return text[:split]

    def flush(self) -> str:
        """The end: what was held back was no stop string."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str:
        """Advances every automaton by a character; the longest stop string that ends here, or ""."""
        found = ""
        for i, (string, table) in enumerate(zip(self._stops.strings, self._stops.tables, strict=True)):
            state = self._states[i]
            while state and string[state] != char:
                state = table[state - 1]
            if string[state] == char:
                state += 1
            if state == len(string):
                found = max(found, string, key=len)
                state = table[state - 1]
            self._states[i] = state
        return found


def _failure_table(string: str) -> tuple[int, ...]:
    """table[i]: length of the longest proper prefix of string[:i+1] that is also its suffix."""
    table = [0] * len(string)
    state = 0
    for i in range(1, len(string)):
        while state and string[i] != string[state]:
            state = table[state - 1]
        if string[i] == string[state]:
            state += 1
        table[i] = state
    return tuple(table)
