"""Layouts that cannot be are refused where the recipe is read, with the key, the reason and the nearest that can."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from launch.recipes import FOLDER
from model.hybrid import model_table
from model.layers.mlp import MLPConfig
from tests.train.layouts import braid
from train.config import load_recipe
from train.layout import check_layout, copied_elements
from train.parallel import Sizes, axis_ranks
from train.reading import ConfigError


@dataclass(frozen=True)
class Alone(MLPConfig):
    """A layer kind that says nothing of ranks."""

    kind: Literal["alone"] = "alone"  # type: ignore[assignment]
    parallel: ClassVar[tuple[str, ...]] = ()


REFUSED = [
    (
        braid("M*-", heads=3, kv_heads=1),
        Sizes(tensor=4),
        "tensor: got 4, wants at most 3, because blocks.1.mixer.qkv.weight (q) divides into no more parts",
    ),
    (
        braid("M-"),
        Sizes(tensor=16),
        "tensor: got 16, wants at most 8, because blocks.0.mixer.in_proj.weight (z) divides into no more parts",
    ),
    (
        braid("M-"),
        Sizes(context=26),
        "context: got 26, wants at most 25, so that each rank has a token of a row of training.sequence_length=25",
    ),
    (
        braid("M-"),
        Sizes(context=13, tensor=2),
        "context: got 13, wants at most 12, so that each rank has a token of a row of training.sequence_length=25",
    ),
    (
        braid("ME"),
        Sizes(expert=3),
        "expert: got 3, wants a divisor of the 4 experts of blocks.1.mixer.up, such as 2",
    ),
    (braid("M-"), Sizes(expert=2), "expert: got 2, wants 1, because no layer of the model has experts"),
]


@pytest.mark.parametrize(("model", "sizes", "line"), REFUSED)
def test_refused_with_the_nearest(model, sizes: Sizes, line: str):
    """A run would die in a collective, with the ranks' stacks instead of a reason."""
    with pytest.raises(ValueError) as error:
        check_layout(model, sizes, sequence_length=25, zero_stage=1)
    assert str(error.value) == line


@pytest.mark.parametrize("key", ["tensor", "context"])
def test_a_kind_that_does_not_say_so_is_not_spread(key: str):
    """A new kind whose author thought of one rank would be computed wrongly on two."""
    model = braid("M-")
    object.__setattr__(model, "layers", {**model.layers, "-": Alone(d_hidden=8)})
    with pytest.raises(ValueError, match=rf"{key}: got 2, wants 1, because layers.- \(kind 'alone'\) cannot be spread"):
        check_layout(model, Sizes(**{key: 2}), sequence_length=25, zero_stage=1)


def test_stage_3_cuts_experts_over_ranks_that_have_others():
    with pytest.raises(ValueError, match="expert: got 2, wants 1 under zero_stage = 3, or zero_stage = 2"):
        check_layout(braid("ME"), Sizes(expert=2), sequence_length=25, zero_stage=3)


@pytest.mark.parametrize(
    ("sizes", "world", "line"),
    [
        (Sizes(tensor=3), 8, "got tensor=3 x context=1, which does not divide the 8 ranks of this run; wants 9 ranks"),
        (Sizes(tensor=2, context=4), 4, "which does not divide the 4 ranks of this run; wants 8 ranks"),
        (Sizes(expert=4, tensor=2), 4, "parallel.expert: got 4, which does not divide the 2 data ranks; wants 2"),
    ],
)
def test_a_world_that_the_mesh_does_not_fill(sizes: Sizes, world: int, line: str):
    with pytest.raises(ValueError) as error:
        sizes.data(world)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("parallel.tensor=0", "parallel.tensor: got 0, wants a positive number of ranks"),
        ("parallel.tensor=64", "parallel.tensor: got 64, wants at most"),
        ("parallel.expert=2", "parallel.expert: got 2, wants 1, because no layer of the model has experts"),
        ("parallel.tenser=2", "parallel.tenser: unknown key; did you mean parallel.tensor?"),
    ],
)
def test_refused_when_the_recipe_is_read(override: str, line: str):
    """The ranks of a cluster would start first."""
    with pytest.raises(ConfigError) as error:
        load_recipe(FOLDER / "tiny.toml", [override])
    assert line in str(error.value)


def test_the_axes_of_a_mesh():
    """ZeRO would add up gradients of other weights, or leave some out."""
    sizes, world = Sizes(tensor=2, context=2, expert=2), 16
    axes = [axis_ranks(rank, world, sizes) for rank in range(world)]
    assert axes[0] == {
        "data": (0, 4, 8, 12),
        "context": (0, 2),
        "tensor": (0, 1),
        "shard": (0, 2, 4, 6, 8, 10, 12, 14),
        "expert": (0, 4),
        "replica": (0, 2, 8, 10),
    }
    for name in axes[0]:
        groups = {own[name] for own in axes}
        assert sorted(rank for group in groups for rank in group) == list(range(world)), f"{name} is no partition"
        assert all(rank in own[name] for rank, own in enumerate(axes))


def test_what_copies_cost_is_counted():
    """Where key/value heads or groups are fewer than ranks, their copies take memory: the log says how much."""
    table = model_table(braid("*", kv_heads=1))
    shared = sum(spec.numel for name, spec in table.items() if "norm" in name) + 2 * 6 * 16  # k and v of one head
    assert copied_elements(table, 2) == shared
    assert copied_elements(table, 1) == 0
