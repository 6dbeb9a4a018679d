"""What a model is: widths, vocabulary, the layers that a recipe names, and the pattern that stacks them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cached_property
from typing import Any, get_args, get_type_hints

from model.layers.base import Dims, require
from model.pattern import check_letter, expand, show
from model.registry import KINDS, LayerConfig


@dataclass(frozen=True)
class ModelConfig:
    """The whole architecture.

    vocab_size: logical size, that of the tokenizer. d_model: width of the residual stream. pattern: the stack, e.g.
    "(M-W-)x12" or "([M*]-)x12" (see model/pattern.py). layers: letter -> layer kind. tie_embeddings: one weight for
    embedding and head. shared: letters that stand for one block, norm and weights, at all their places (Zamba).
    branch_gates: letter in brackets -> initial value of a learned factor of that branch (Hydra). norm_eps: of every
    norm. init_std: standard deviation of initial matrices, none for uniform ±1/sqrt(fan_in). embedding_std: of the
    embedding. rescale_outputs: divide the initial output projections by sqrt(number of layers), parallel branches
    counted one by one.
    """

    vocab_size: int
    d_model: int
    pattern: str
    layers: Mapping[str, LayerConfig]
    tie_embeddings: bool = True
    shared: str = ""
    branch_gates: Mapping[str, float] = field(default_factory=dict)
    norm_eps: float = 1e-5
    init_std: float | None = 0.02
    embedding_std: float = 0.02
    rescale_outputs: bool = True

    def __post_init__(self) -> None:
        require(self.vocab_size > 0, "vocab_size", self.vocab_size, "a positive number")
        require(self.d_model > 0, "d_model", self.d_model, "a positive number")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "a positive number")
        require(self.embedding_std > 0, "embedding_std", self.embedding_std, "a positive number")
        require(self.init_std is None or self.init_std > 0, "init_std", self.init_std, "a positive number, or none")
        for letter, layer in self.layers.items():
            check_letter(letter)
            try:
                layer.check(self.d_model)
            except ValueError as error:
                raise ValueError(f"layers.{letter}.{error}") from None
        self._check_composition()

    def _check_composition(self) -> None:
        alone = {letters for letters in self.blocks if len(letters) == 1}
        parallel = {letter for letters in self.blocks if len(letters) > 1 for letter in letters}
        for letter in self.shared:
            wants = "letters of the pattern that never stand in brackets"
            require(letter in alone - parallel, "shared", repr(letter), wants)
        for letter, gate in self.branch_gates.items():
            require(letter in parallel, f"branch_gates.{letter}", gate, "a letter that stands in brackets")
            require(math.isfinite(gate), f"branch_gates.{letter}", gate, "a finite number")

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The stack as one string a block: a letter, or the letters of parallel branches."""
        own = {letter for letter, layer in self.layers.items() if layer.residual == "own"}
        return expand(self.pattern, self.layers, own)

    @property
    def stack(self) -> str:
        """The stack to show: a letter a layer, parallel branches in brackets."""
        return show(self.blocks)

    @property
    def stacked(self) -> list[LayerConfig]:
        """The layer configs in order, parallel branches one after the other."""
        return [self.layers[letter] for letters in self.blocks for letter in letters]

    @property
    def places(self) -> list[int]:
        """For each block the place in the stack that its weights are named after: its own, or the first of a shared
        letter."""
        blocks = self.blocks
        return [blocks.index(letters) if letters in {*self.shared} else i for i, letters in enumerate(blocks)]

    def recomputed(self, chosen: bool | str) -> frozenset[int]:
        """Places of the stack whose block runs again in the backward pass. chosen: all, none, or those with a layer of
        these letters."""
        places = enumerate(self.blocks)
        return frozenset(i for i, letters in places if chosen is True or (chosen and not {*chosen}.isdisjoint(letters)))

    def block(self, place: int) -> tuple[list[LayerConfig], list[float | None]]:
        """The layer configs of a block, and the initial values of their gates."""
        letters = self.blocks[place]
        gates = [self.branch_gates.get(letter) if len(letters) > 1 else None for letter in letters]
        return [self.layers[letter] for letter in letters], gates

    @property
    def dims(self) -> Dims:
        return Dims(
            d_model=self.d_model,
            n_residuals=len(self.stacked),
            init_std=self.init_std,
            rescale_outputs=self.rescale_outputs,
            norm_eps=self.norm_eps,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; `from_dict` gives an equal config back."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "ModelConfig":
        layers = {letter: _layer_from_dict(letter, layer) for letter, layer in values["layers"].items()}
        return ModelConfig(**{**values, "layers": layers})


def _layer_from_dict(letter: str, values: Mapping[str, Any]) -> LayerConfig:
    kind = values["kind"]
    require(kind in KINDS, f"layers.{letter}.kind", repr(kind), f"one of {', '.join(KINDS)}")
    return _from_plain(KINDS[kind], values)


def _from_plain(hint: Any, value: Any) -> Any:
    """A value of this type from what JSON holds: tables become dataclasses, in a union by `kind`, and lists tuples."""
    if isinstance(value, list):
        return tuple(value)
    members: list[Any] = [member for member in get_args(hint) or (hint,) if is_dataclass(member)]
    if not members or not isinstance(value, Mapping):
        return value
    cls: Any = next(member for member in members if len(members) == 1 or member.kind == value["kind"])
    hints = get_type_hints(cls)
    return cls(**{key: _from_plain(hints[key], item) for key, item in value.items()})
