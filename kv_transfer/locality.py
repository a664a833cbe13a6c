"""What two workers must share for a transport to work between them: a process, or a host.

host       boot id of the kernel                         equal: one machine, one driver
process    boot id / pid namespace : pid : start time    equal: one process; the start time tells a reused pid apart
"""

import os
import select
import signal
from pathlib import Path


def host() -> str:
    """Equal in all processes of one machine until it is booted again; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def process() -> str:
    """This process, among all that ever ran."""
    pid = os.getpid()
    return f"{_scope()}:{pid}:{_started(pid)}"


def is_gone(name: str) -> bool:
    """Whether the process that gave itself this name has ended. False when it cannot be told from here."""
    scope, _, rest = name.rpartition(":")[0].rpartition(":")
    pid, started = rest, name.rpartition(":")[2]
    if not scope or scope != _scope() or not pid.isdigit():
        return False
    return _started(int(pid)) != started


class Life:
    """Of the process that gave itself a name, asked often: a descriptor of it, where it can be had."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._poll: select.poll | None = None
        self._file = -1
        if not is_here(name):
            return
        try:
            self._file = os.pidfd_open(int(name.split(":")[-2]))
        except OSError:
            return
        if not is_gone(name):  # so the descriptor is of that process, and not of one that got its pid
            self._poll = select.poll()
            self._poll.register(self._file, select.POLLIN)

    @property
    def is_over(self) -> bool:
        """False when it cannot be told from here."""
        return bool(self._poll.poll(0)) if self._poll is not None else is_gone(self._name)

    def close(self) -> None:
        self._poll = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def is_here(name: str) -> bool:
    """Whether `is_gone` can tell."""
    return bool(_scope()) and name.startswith(f"{_scope()}:")


def end(name: str, within_s: float) -> bool:
    """Kills the process that gave itself this name; True once it has ended, False if that cannot be told from here, or
    not so soon. Raises PermissionError. Blocks."""
    if not is_here(name) or is_gone(name):
        return is_gone(name)
    try:
        process = os.pidfd_open(int(name.split(":")[-2]))
    except ProcessLookupError:
        return is_gone(name)
    try:
        if not is_gone(name):  # so the descriptor is of that process, and not of one that got its pid
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], within_s)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)
    return is_gone(name)


def _scope() -> str:
    """Where a pid means one process: this boot and pid namespace. Empty where either is not known."""
    try:
        return f"{host()}/{os.readlink('/proc/self/ns/pid')}" if host() else ""
    except OSError:
        return ""


def _started(pid: int) -> str:
    """In ticks since boot; empty for a pid that nobody has, or a zombie: its memory and devices are let go."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
