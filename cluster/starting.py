"""What a person sees while a deployment comes up: a line for each thing that happens, a bar for what takes long."""

import math
import re
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

_LOG_EVERY_S = 10.0
_UNDER_WAY = re.compile(r"(?P<part>\S+) +loading +(?P<what>.*?) \.\.\.")
_SHARE = re.compile(r"(\d+)%")
_NUMBER = re.compile(r"\d+(\.\d+)?")


class Starting:
    """Call it with lines such as launch.up says. Those that end in "..." tell how far something is: on a terminal they
    move a bar (by "N%", if they hold it); in a log the first of a kind is kept, and then one every ten seconds.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._logged: dict[str, float] = {}
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._progress.add_task(title, total=None)

    def __enter__(self) -> "Starting":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, line: str) -> None:
        found = _UNDER_WAY.fullmatch(line)
        if found is None:
            self._console.print(line, markup=False)
            if (bar := self._bars.pop(line.split(" ", 1)[0], None)) is not None:
                self._progress.remove_task(bar)
        elif self._console.is_terminal:
            self._move(found["part"], found["what"])
        else:
            self._log(line)

    def _move(self, part: str, what: str) -> None:
        share = _SHARE.search(what)
        if part not in self._bars:
            self._bars[part] = self._progress.add_task("", total=None)
        self._progress.update(
            self._bars[part],
            description=f"{part} {what}",
            total=100 if share else None,
            completed=int(share[1]) if share else 0,
        )

    def _log(self, line: str) -> None:
        kind, now = _NUMBER.sub("", line), time.monotonic()
        if now >= self._logged.get(kind, -math.inf) + _LOG_EVERY_S:
            self._logged[kind] = now
            self._console.print(line, markup=False)
