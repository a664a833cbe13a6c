"""What one push names: a rectangle of blocks and layers."""

from dataclasses import dataclass, replace

from kv_transfer.base import ReadyEvent


@dataclass(frozen=True, slots=True)
class Rect:
    """Pages pushed together: the logical blocks from `block_start`, layers [layer_start, layer_stop)."""

    block_ids: tuple[int, ...]
    block_start: int
    layer_start: int
    layer_stop: int
    after: ReadyEvent | None

    def join(self, other: "Rect") -> "Rect | None":
        """One rectangle of both, if `other` holds the layers that follow in the same blocks."""
        if (other.block_ids, other.block_start, other.layer_start) == (
            self.block_ids,
            self.block_start,
            self.layer_stop,
        ):
            return replace(self, layer_stop=other.layer_stop, after=other.after)
        return None

    def split_blocks(self, count: int) -> "tuple[Rect, Rect]":
        return replace(self, block_ids=self.block_ids[:count]), replace(
            self, block_ids=self.block_ids[count:], block_start=self.block_start + count
        )
