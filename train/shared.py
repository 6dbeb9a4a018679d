"""Gradients of what several tensor ranks hold (norms, routers, the B and C of few groups): each has a part of the sum.

They are added up once a step, after accumulation and after ZeRO's own reduction, so that it costs one collective of few
numbers at any stage: every rank puts the elements that it owns into one vector of all shared elements of the model.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from model.params import Box, Piece, Place, Table, local_layout
from model.weights.fragments import pieces_in
from train.health import GradientFragment
from train.parallel import Mesh


def shared_pieces(table: Table, tensor: int) -> Iterator[tuple[str, Piece]]:
    """What lies on more than one of so many tensor ranks and takes a gradient, each once."""
    for name, spec in table.items():
        for rank in range(tensor):
            for piece in local_layout(spec, Place(rank, tensor)).pieces:
                if piece.copies > 1 and piece.owner and not spec.frozen:
                    yield name, piece


def shared_elements(table: Table, tensor: int) -> int:
    return sum(piece.numel for _, piece in shared_pieces(table, tensor))


class SharedGradients:
    """Of a model with this table on this mesh. elements: how many elements lie on more than one tensor rank."""

    def __init__(self, table: Table, mesh: Mesh) -> None:
        self.mesh = mesh
        self.layouts = {name: local_layout(spec, mesh.place) for name, spec in table.items()}
        self.offsets: dict[tuple[str, Box], int] = {}
        self.elements = 0
        for name, piece in shared_pieces(table, mesh.tensor.size):
            self.offsets[name, piece.box] = self.elements
            self.elements += piece.numel

    def sum(self, owned: Iterable[GradientFragment], held: Iterable[GradientFragment]) -> None:
        """Adds up the shared gradients, in place. owned: every element once over the ranks of ZeRO's group. held: all
        that this rank has of them."""
        if not self.elements:
            return
        total = torch.zeros(self.elements, device=self.mesh.device)
        for at, part in self._parts(owned):
            total[at : at + part.numel()] += part.to(total.device)
        self.mesh.sum_(total)
        for at, part in self._parts(held):
            part.copy_(total[at : at + part.numel()])

    def _parts(self, fragments: Iterable[GradientFragment]) -> Iterable[tuple[int, Tensor]]:
        """Views of the shared elements of fragments, and where they lie in the vector."""
        for name, start, stop, value in fragments:
            for piece, low, high in pieces_in(self.layouts[name], start, stop):
                if piece.copies > 1:
                    yield self.offsets[name, piece.box] + low - piece.offset, value[low - start : high - start]
