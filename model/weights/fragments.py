"""Fragments: the unit that a checkpoint is made of, and the arithmetic between flat ranges and boxes.

Every rank of any layout (tensor-parallel boxes, ZeRO's flat ranges of the local tensor) owns fragments; every element
of a logical tensor lies in exactly one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from model.params import Box, LocalLayout, Piece, box_numel, box_shape


@dataclass(frozen=True)
class Fragment:
    """Elements `[start, stop)`, in C order inside `box`, of a logical tensor.

    tensor: its logical name. kind: "weight", "buffer" or a named optimizer state such as "optimizer/exp_avg". block:
    the named block that the box belongs to ("" without blocks). box: in coordinates of the logical tensor.
    """

    tensor: str
    kind: str
    block: str
    box: Box
    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start < self.stop <= box_numel(self.box), f"empty or outside its box: {self}"

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> str:
        """Its name in the safetensors file."""
        block = f"#{self.block}" if self.block else ""
        spans = ",".join(f"{low}:{high}" for low, high in self.box)
        return f"{self.kind}/{self.tensor}{block}[{spans}]@{self.start}:{self.stop}"

    def part(self, start: int, stop: int) -> "Fragment":
        """Its elements `[start, stop)`, counted from its own first one."""
        return Fragment(self.tensor, self.kind, self.block, self.box, self.start + start, self.start + stop)


def whole_layout(shape: tuple[int, ...], owner: bool = True) -> LocalLayout:
    """The layout of a tensor that every rank holds whole, such as a buffer; one rank is its owner."""
    return LocalLayout(shape, (Piece("", tuple((0, n) for n in shape), 0, 1, owner),))


def fragments_of(
    name: str, kind: str, layout: LocalLayout, start: int = 0, stop: int | None = None
) -> list[tuple[Fragment, int, int]]:
    """What the owner of the flat range `[start, stop)` of a local tensor writes: padding and copies owned by another
    tensor rank are left out.

    Returns `(fragment, local start, local stop)`; the local bounds count from the start of the local tensor.
    """
    return [
        (Fragment(name, kind, piece.block, piece.box, low - piece.offset, high - piece.offset), low, high)
        for piece, low, high in pieces_in(layout, start, stop)
        if piece.owner
    ]


def pieces_in(layout: LocalLayout, start: int = 0, stop: int | None = None) -> Iterator[tuple[Piece, int, int]]:
    """The pieces, owned or not, that the flat range `[start, stop)` of the local tensor touches, and where."""
    total = math.prod(layout.shape)
    stop = total if stop is None else stop
    assert 0 <= start <= stop <= total, f"range [{start}, {stop}) outside a local tensor of {total} elements"
    for piece in layout.pieces:
        low, high = max(start, piece.offset), min(stop, piece.offset + piece.numel)
        if low < high:
            yield piece, low, high


def intersect(a: Box, b: Box) -> Box | None:
    """The common box; None when there is none."""
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return common if all(low < high for low, high in common) else None


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """C-order strides in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def flat_index(box: Box, point: tuple[int, ...]) -> int:
    """Position of a logical coordinate in the flattened box."""
    strides = strides_of(box_shape(box))
    return sum((x - low) * stride for x, (low, _), stride in zip(point, box, strides, strict=True))


def boxes_of_range(box: Box, start: int, stop: int) -> Iterator[Box]:
    """The flat range `[start, stop)` of `box` as boxes, at most two for each axis but the last, and one."""
    if start >= stop:
        return
    if not box:
        yield ()
        return
    low, inner = box[0][0], box_numel(box[1:])
    if start % inner == 0 and stop % inner == 0:
        yield ((low + start // inner, low + stop // inner), *box[1:])
        return
    first, last = -(-start // inner), stop // inner
    if first > last:
        yield from _in_row(box, last, start - last * inner, stop - last * inner)
        return
    yield from _in_row(box, first - 1, start - (first - 1) * inner, inner if start % inner else 0)
    if first < last:
        yield ((low + first, low + last), *box[1:])
    yield from _in_row(box, last, 0, stop - last * inner)


def _in_row(box: Box, row: int, start: int, stop: int) -> Iterator[Box]:
    low = box[0][0] + row
    for rest in boxes_of_range(box[1:], start, stop):
        yield ((low, low + 1), *rest)
