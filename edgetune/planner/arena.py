"""onnxruntime's arena: how many bytes it holds after a sequence of allocations.

A session frees each value after its last reader, but the arena (`BFCArena`, extended by what is asked for) gives
nothing back to the system, and joins free neighbours only inside one extension. So it grows wherever no free piece is
large enough, however much is free in smaller ones, and its size follows from the order of the allocations alone. This
is that bookkeeping without the memory: the smallest free piece that is large enough is taken, of equal ones that with
the lowest address, and the rest is split off where it is no smaller than what was asked for.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass

ALIGNMENT = 256
SMALLEST_SPLIT = 128 << 20  # a rest of this size is split off in any case
_FAR = 1 << 40  # between extensions, each below the one before: so Linux maps them


@dataclass(eq=False)
class Piece:
    """A range of an extension: a value's memory, or free."""

    size: int
    address: int
    part: str = ""
    asked: int = 0
    before: Piece | None = None
    behind: Piece | None = None


class Arena:
    """The arena of one process; `take` and `give` are an allocation and its end."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self.live: Counter[str] = Counter()
        self.at_growth: Counter[str] = Counter()
        """Bytes in use by part when it grew last."""
        self._free: list[tuple[int, int, Piece]] = []
        self._count = 0

    def take(self, part: str, asked: int) -> Piece:
        """Memory for a value of so many bytes, which count as this part."""
        size = max(ALIGNMENT, -(-asked // ALIGNMENT) * ALIGNMENT)
        at = bisect_left(self._free, (size,))
        if at < len(self._free):
            piece = self._free.pop(at)[2]
            if piece.size >= 2 * size or piece.size - size >= SMALLEST_SPLIT:
                self._split(piece, size)
            grows = False
        else:
            self._count += 1
            piece, grows = Piece(size, -self._count * _FAR), True
            self.total_bytes += size
        piece.part, piece.asked = part, asked
        self.live[part] += asked
        if grows:
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
