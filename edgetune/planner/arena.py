"""onnxruntime's arena: how far it is touched by a sequence of allocations.

The arena of the training graphs (`BFCArena`, made in `runtime.native`) is one range of addresses, of which a page is
memory from when it is first used. The smallest free piece that is large enough is taken, of equal ones that with the
lowest address; the rest is split off, and free neighbours are joined. So the range is touched up to the highest end of
any piece, a little beyond what is in use at once. This is that bookkeeping without the memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass

ALIGNMENT = 256
HANDLE_SHARE = 32  # the arena notes 8 bytes for each 256 of its range, from the beginning
_ENDLESS = 1 << 60


@dataclass(eq=False)
class Piece:
    """A part of the range: a value's memory, or free."""

    size: int
    address: int
    part: str = ""
    asked: int = 0
    before: Piece | None = None
    behind: Piece | None = None


class Arena:
    """An arena in which nothing lies yet; `take` and `give` are an allocation and its end."""

    def __init__(self) -> None:
        self.touched_bytes = 0
        self.taken_bytes = 0
        """All values together, whether or not they exist at once."""
        self.live: Counter[str] = Counter()
        self.at_growth: Counter[str] = Counter()
        """Bytes in use by part when it was touched further for the last time."""
        self._free = [(_ENDLESS, 0, Piece(_ENDLESS, 0))]

    def take(self, part: str, asked: int) -> Piece:
        """Memory for a value of so many bytes, which count as this part."""
        size = max(ALIGNMENT, -(-asked // ALIGNMENT) * ALIGNMENT)
        piece = self._free.pop(bisect_left(self._free, (size,)))[2]
        if piece.size > size:
            self._split(piece, size)
        piece.part, piece.asked = part, asked
        self.live[part] += asked
        self.taken_bytes += asked
        if piece.address + size > self.touched_bytes:
            self.touched_bytes = piece.address + size
            self.at_growth = self.live.copy()
        return piece

    def give(self, *pieces: Piece) -> None:
        """These values are read no more."""
        for piece in pieces:
            self.live[piece.part] -= piece.asked
            piece.part = ""
            for other in (piece.before, piece.behind):
                if other is not None and not other.part:
                    self._free.remove((other.size, other.address, other))
                    piece = self._joined(piece, other)
            insort(self._free, (piece.size, piece.address, piece))

    def _split(self, piece: Piece, size: int) -> None:
        rest = Piece(piece.size - size, piece.address + size)
        piece.size = size
        rest.before, rest.behind, piece.behind = piece, piece.behind, rest
        if rest.behind is not None:
            rest.behind.before = rest
        insort(self._free, (rest.size, rest.address, rest))

    @staticmethod
    def _joined(one: Piece, other: Piece) -> Piece:
        """Both of two neighbours as one free piece."""
        first, second = (other, one) if other.behind is one else (one, other)
        first.size += second.size
        first.behind = second.behind
        if first.behind is not None:
            first.behind.before = first
        return first
