"""A deployment's status as tables for people."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_COLOURS = {"ready": "green", "draining": "yellow", "failed": "red", "lost": "red", "stopped": "dim"}


def status_view(status: dict[str, Any]) -> RenderableType:
    router = status["router"]
    head = Text.assemble(
        ("deployment ", "dim"),
        status["name"],
        ("  model ", "dim"),
        status["model"],
        ("  transport ", "dim"),
        status["transport"],
        ("  router ", "dim"),
        (router["address"] or "-"),
        " ",
        _state(router),
        ("  in flight ", "dim"),
        str(router["report"].get("running_requests", "-")),
    )
    pools = Text("  ").join(
        Text(f"{name} {pool['ready']}/{pool['target']} ready") for name, pool in status["pools"].items() if _shown(pool)
    )
    problems = [
        Text(f"{part['id']}: {part['detail'] or part['last_error']}", "yellow")
        for part in [router, *(worker for pool in status["pools"].values() for worker in pool["workers"])]
        if part["detail"] or part["state"] == "lost"
    ]
    return Group(head, pools, _workers(status), *_links(status), *_returned(status), *problems)


def _links(status: dict[str, Any]) -> list[Text]:
    """How KV gets from each worker to those it has met, and why that way; blocks that a writer still holds."""
    lines = []
    for pool in status["pools"].values():
        for worker in pool["workers"]:
            if corrupt := worker["report"].get("transfers_corrupt"):
                lines.append(Text(f"{worker['id']}: {corrupt} transfers were corrupt", "yellow"))
            blocks = worker["report"].get("quarantined_blocks")
            lines += [
                Text(f"{worker['id']}: {blocks} blocks wait for {waits}", "yellow") for waits in silent_writers(worker)
            ]
            for link in worker["report"].get("links", ()):
                speed = f" {link['gb_per_s']:.1f} GB/s" if link["gb_per_s"] else ""
                why = f" ({link['why']})" if link["why"] else ""
                lines.append(Text(f"KV {worker['id']} -> {link['worker_id']}: {link['transport']}{speed}{why}", "dim"))
    return lines


def silent_writers(worker: dict[str, Any]) -> list[str]:
    """Who may still be writing into the worker's pool though its transfers are over, and for how long."""
    return [
        f"{writer['worker_id']} ({writer['incarnation'][:8]}), silent for {writer['age_s']:.0f} s"
        for writer in worker["report"].get("silent_writers", ())
    ]


def _workers(status: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("worker", "role", "state", "node", "pid", "address", "incarnation"):
        table.add_column(column, no_wrap=True)
    for column in ("restarts", "running", "waiting", "blocks free/total", "reserved", "pinned", "KV out/in", "steps"):
        table.add_column(column, justify="right", no_wrap=True)
    for pool in status["pools"].values():
        for worker in pool["workers"]:
            load = worker["report"]
            table.add_row(
                worker["id"],
                pool["role"],
                _state(worker),
                worker["node"][:8],
                str(worker["pid"] or ""),
                worker["address"],
                worker["incarnation"][:8],
                str(worker["restarts"]),
                str(load.get("num_running", "")),
                str(load.get("num_waiting", "")),
                f"{load['free_blocks']}/{load['total_blocks']}" if "total_blocks" in load else "",
                str(load.get("reserved_blocks", "")),
                str(load.get("pinned_blocks", "")),
                f"{_size(load['kv_bytes_sent'])}/{_size(load['kv_bytes_received'])}" if "kv_bytes_sent" in load else "",
                str(load.get("steps", "")),
            )
    return table


def _returned(status: dict[str, Any]) -> list[Text]:
    """One line once something was returned to a prefill worker, or would have been."""
    reports = [worker["report"] for pool in status["pools"].values() for worker in pool["workers"]]
    names = ("kv_returned_bytes", "kv_returned_blocks", "kv_returns_refused", "kv_returns_dropped")
    num_bytes, *counts = (sum(report.get(name, 0) for report in reports) for name in names)
    if not any((num_bytes, *counts)):
        return []
    blocks, refused, dropped = counts
    return [
        Text(f"KV returned after turns: {_size(num_bytes)} in {blocks} blocks; {refused} refused, {dropped} dropped")
    ]


def _state(part: dict[str, Any]) -> Text:
    return Text(part["state"], _COLOURS.get(part["state"], "cyan"))


def _shown(pool: dict[str, Any]) -> bool:
    return bool(pool["target"] or pool["workers"])


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "K", "M", "G"):
        if size < 1024 or unit == "G":
            return f"{size:.0f}{unit}" if size >= 10 or unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    raise AssertionError
