"""What a model is: widths, vocabulary, the layers that a recipe names, and the pattern that stacks them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model.layers.base import Dims, require
from model.pattern import check_letter, expand
from model.registry import KINDS, LayerConfig


@dataclass(frozen=True)
class ModelConfig:
    """The whole architecture.

    vocab_size: logical size, that of the tokenizer. d_model: width of the residual stream. pattern: the stack, e.g.
    "(M-W-)x12" (see model/pattern.py). layers: letter -> layer kind. tie_embeddings: one weight for embedding and
    head. norm_eps: of every norm. init_std: standard deviation of initial matrices, none for uniform ±1/sqrt(fan_in).
    embedding_std: of the embedding. rescale_outputs: divide the initial output projections by sqrt(number of layers).
    """

    vocab_size: int
    d_model: int
    pattern: str
    layers: Mapping[str, LayerConfig]
    tie_embeddings: bool = True
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
        expand(self.pattern, self.layers)

    @property
    def stack(self) -> str:
        """One letter a layer."""
        return expand(self.pattern, self.layers)

    @property
    def stacked(self) -> list[LayerConfig]:
        """The layer configs in order."""
        return [self.layers[letter] for letter in self.stack]

    @property
    def dims(self) -> Dims:
        return Dims(
            d_model=self.d_model,
            n_residuals=len(self.stack),
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
    return KINDS[kind](**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
