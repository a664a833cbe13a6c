"""What benchmarks/handoff_marks.py wraps is there, and every moment that it tells of is left by something."""

from benchmarks.handoff_marks import _CALLS, MARKS, START, STOP


def test_every_mark_is_made_by_a_method_that_exists():
    for kind, name, _, _ in _CALLS:
        assert callable(getattr(kind, name)), (kind, name)
    made = {mark for _, _, before, after in _CALLS for mark in (before, after)} | {"computed", "step_ended"}
    marks = [mark for mark, _, _ in MARKS]
    assert set(marks) == made - {None}
    assert (marks[0], marks[-1]) == (START, STOP) and {where for _, where, _ in MARKS} == {"P", "D"}
