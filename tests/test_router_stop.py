"""Stop strings: found wherever deltas cut them, nothing of them leaks, nothing else is lost."""

from hypothesis import given
from hypothesis import strategies as st

from router.stop import Stops, StopScanner

ALPHABET = "ab "


def scan(deltas: list[str], strings: list[str], include: bool = False) -> tuple[str, str | None]:
    scanner = StopScanner(Stops.build(strings, include))
    text = ""
    for delta in deltas:
        text += scanner.push(delta, may_stop=True)
        if scanner.matched is not None:
            return text, scanner.matched
    return text + scanner.flush(), None


def reference(text: str, strings: list[str], include: bool) -> tuple[str, str | None]:
    """By search over every prefix of the text."""
    for end in range(1, len(text) + 1):
        found = max((s for s in strings if text[:end].endswith(s)), key=len, default=None)
        if found is not None:
            return text[:end] if include else text[: end - len(found)], found
    return text, None


@given(
    st.lists(st.text(ALPHABET, max_size=5), max_size=12),
    st.lists(st.text(ALPHABET, min_size=1, max_size=6), max_size=4),
    st.booleans(),
)
def test_equals_a_search_of_the_whole_text(deltas: list[str], strings: list[str], include: bool) -> None:
    assert scan(deltas, strings, include) == reference("".join(deltas), strings, include)


@given(st.text(ALPHABET, max_size=40), st.lists(st.text(ALPHABET, min_size=1, max_size=6), min_size=1, max_size=4))
def test_holds_back_no_more_than_needed(text: str, strings: list[str]) -> None:
    scanner = StopScanner(Stops.build(strings, False))
    out = ""
    for end, char in enumerate(text, 1):
        out += scanner.push(char, may_stop=True)
        if scanner.matched is not None:
            return
        held = text[len(out) : end]
        longest = max((n for s in strings for n in range(len(s)) if text[:end].endswith(s[:n])), default=0)
        assert len(held) == longest


def test_below_min_tokens_a_match_is_passed_over() -> None:
    scanner = StopScanner(Stops.build(["END"], False))
    assert scanner.push("an END", may_stop=False) == "an END"
    assert scanner.push(" and E", may_stop=True) == " and "
    assert scanner.push("ND more", may_stop=True) == ""
    assert scanner.matched == "END"


def test_split_across_three_deltas() -> None:
    assert scan(["x<|", "en", "d|>y"], ["<|end|>"]) == ("x", "<|end|>")
    assert scan(["x<|", "en", "d|>y"], ["<|end|>"], include=True) == ("x<|end|>", "<|end|>")
    assert scan(["x<|", "en", "joy"], ["<|end|>"]) == ("x<|enjoy", None)
