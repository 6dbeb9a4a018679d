"""Which layouts a model can be trained in. What cannot be is refused before anything starts, with the reason and the
nearest layout that can."""

from collections.abc import Iterator

from model.config import ModelConfig
from model.hybrid import model_table
from model.params import Place, Table, local_layout
from train.parallel import Sizes
from train.reading import require


def check_layout(model: ModelConfig, sizes: Sizes, *, sequence_length: int, zero_stage: int) -> None:
    """Raises ValueError naming the key of `parallel` that `model` cannot have."""
    for key in ("tensor", "context", "expert"):
        if getattr(sizes, key) > 1:
            _check_kinds(model, key, getattr(sizes, key))
    most = min((leaders for _, leaders in _leaders(model)), default=1)
    name = next((name for name, leaders in _leaders(model) if leaders == most), "")
    require(
        sizes.tensor <= most,
        "tensor",
        sizes.tensor,
        f"at most {most}, because {name} divides into no more parts",
    )
    ranks = sizes.tensor * sizes.context
    key = "context" if sizes.context > 1 else "tensor"
    room = sequence_length // sizes.tensor if sizes.context > 1 else sequence_length
    wants = f"at most {room}, so that each rank has a token of a row of training.sequence_length={sequence_length}"
    require(ranks <= sequence_length, key, getattr(sizes, key), wants)
    if sizes.expert > 1:
        _check_experts(model, sizes.expert, zero_stage)


def _check_kinds(model: ModelConfig, key: str, size: int) -> None:
    """A layer kind says what it can be spread over; experts are spread where there are any."""
    stacked = {letter: model.layers[letter] for block in model.blocks for letter in block}
    able = [letter for letter, layer in stacked.items() if key in layer.parallel]
    if key == "expert":
        require(bool(able), key, size, "1, because no layer of the model has experts")
        return
    for letter, layer in stacked.items():
        ok = letter in able and layer.residual == "add"
        require(ok, key, size, f"1, because layers.{letter} (kind {layer.kind!r}) cannot be spread over {key} ranks")


def _check_experts(model: ModelConfig, size: int, zero_stage: int) -> None:
    wants = "1 under zero_stage = 3, or zero_stage = 2: DeepSpeed's stage 3 cuts every weight over all data ranks"
    require(zero_stage < 3, "expert", size, wants)
    for name, spec in model_table(model).items():
        if spec.experts:
            below = max(d for d in range(1, spec.experts + 1) if spec.experts % d == 0 and d <= size)
            wants = f"a divisor of the {spec.experts} experts of {name.rpartition('.')[0]}, such as {below}"
            require(spec.experts % size == 0, "expert", size, wants)


def _leaders(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """What decides into how many parts a weight can be cut, by name: heads, channels, ids."""
    for name, spec in model_table(model).items():
        for block in spec.named_blocks():
            if block.split is not None:
                yield f"{name} ({block.name})" if block.name else name, block.split.leaders


def copied_elements(table: Table, tensor: int) -> int:
    """How many elements the tensor ranks hold together beyond those of the model: copies of norms, routers and shared
    heads."""
    places = [Place(rank, tensor) for rank in range(tensor)]
    pieces = (piece for spec in table.values() for place in places for piece in local_layout(spec, place).pieces)
    return sum(piece.numel for piece in pieces) - sum(spec.numel for spec in table.values())
