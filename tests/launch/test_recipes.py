"""Every shipped recipe: it loads, builds, has the parameters of the model that it is named after, and the tiny ones
learn."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.prepare import open_prepared
from launch.recipes import FOLDER, find_recipe, shipped
from model.hf.nemotron_h import obstacle
from model.hybrid import HybridLM, initialise_model, model_table, parameter_count
from model.params import Normal, Uniform, count_parameters, local_layout
from tests.launch.published import ACTIVE, DEFINED, PUBLISHED
from tests.train.runs import braid, curve, prepare_tiny
from train.config import Recipe, load_recipe
from train.optim import build_optimizer, parameter_groups

TINY = [name for name in shipped() if name.startswith("tiny")]
LARGEST_TINY = 150_000


def load(name: str, *overrides: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.toml", overrides)


@pytest.mark.parametrize("name", shipped())
def test_the_built_model_has_the_published_number_of_parameters(name: str):
    """A recipe without a row in the table fails: add one, with its source."""
    config = load(name).model
    built = HybridLM(config, device="meta")
    table = model_table(config)
    padding = sum(local_layout(spec).shape[0] * spec.numel // spec.shape[0] - spec.numel for spec in table.values())
    assert sum(weight.numel() for weight in built.parameters()) - padding == parameter_count(config)
    if name in TINY:
        assert parameter_count(config) < LARGEST_TINY
        return
    published = PUBLISHED[name]
    kept = {n: s for n, s in table.items() if published.embeddings or n not in ("embedding.weight", "head.weight")}
    found = count_parameters(kept) + published.missing
    assert abs(found - published.value) <= published.within, f"{found:,}, but {published.source}: {published.value:,}"


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_meets_the_published_number_of_parameters(name: str):
    table = model_table(load(name).model)
    used = sum(spec.numel * spec.used for n, spec in table.items() if n not in ("embedding.weight", "head.weight"))
    published = ACTIVE[name]
    assert abs(used - published.value) <= published.within, f"{used:,}, but {published.source}: {published.value:,}"


@pytest.mark.parametrize("name", DEFINED)
def test_the_number_of_parameters_is_that_of_the_class_that_defines_the_model(name: str):
    pytest.importorskip("transformers", reason="the classes are transformers'")
    assert parameter_count(load(name).model) + PUBLISHED[name].missing == DEFINED[name]()


def test_a_hybrid_by_shares_is_the_published_pattern():
    by_shares = load("mamba2-hybrid-8b", "model.pattern=ratio(56, M, *=0.07, -=0.5)").model
    assert by_shares.stack == load("mamba2-hybrid-8b").model.stack
    assert [by_shares.stack.count(letter) for letter in "M*-"] == [24, 4, 28]
    by_shares = load("mamba2-hybrid-800m", "model.pattern=ratio(48, M, *=0.08, -=0.5)").model
    assert by_shares.stack == load("mamba2-hybrid-800m").model.stack


def places(name: str, letter: str) -> list[int]:
    return [index for index, letters in enumerate(load(name).model.blocks) if letters == letter]


def test_attention_stands_where_it_is_published():
    assert places("mamba2-attention-2.7b", "*") == [9, 18, 27, 36, 45, 56]
    assert places("mamba2-hybrid-8b", "*") == [10, 22, 33, 45]
    assert places("nemotron-h-8b", "*") == [7, 18, 29, 40]
    assert [place // 2 for place in places("granite-4-h-micro", "*")] == [5, 15, 25, 35]
    assert [place // 2 for place in places("jamba-52b", "*")] == [4, 12, 20, 28]
    before_mamba = [load("zamba2-2.7b").model.stack[:place].count("M") for place in places("zamba2-2.7b", "A")]
    assert before_mamba == [6, 18, 30, 42, 51]


@pytest.mark.parametrize("name", ["nemotron-h-8b", "tiny-nemotron-h"])
def test_nemotron_h_can_be_exported_as_the_native_class(name: str):
    assert obstacle(load(name).model) is None


def test_initial_values_are_the_published_ones():
    """Mamba's harness keeps torch's uniform matrices, Megatron draws normal ones; both make output projections smaller
    by the square root of the number of layers."""
    table = model_table(load("samba-421m").model)
    deep = 24**-0.5
    assert table["embedding.weight"].init == Normal(0.02)
    projections = (
        (0, "in_proj", 1536, 1.0),
        (0, "out_proj", 3072, deep),
        (1, "down", 4096, deep),
        (2, "out", 1536, deep),
    )
    for block, name, fan_in, factor in projections:
        init = table[f"blocks.{block}.mixer.{name}.weight"].init
        assert isinstance(init, Uniform) and init.low == -init.high
        assert init.high == pytest.approx(factor * fan_in**-0.5)
    table = model_table(load("mamba2-hybrid-8b").model)
    assert table["blocks.1.mixer.up.weight"].init == Normal(0.02)
    init = table["blocks.1.mixer.down.weight"].init
    assert isinstance(init, Normal) and init.std == pytest.approx(0.02 * 56**-0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `braid prepare tiny` was run."""
    return prepare_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_learns_in_a_few_steps(name: str, folder: Path):
    recipe, steps = load(name), 8
    assert recipe.data == load("tiny").data, "prepared once, for all of them"
    model = HybridLM(recipe.model, recipe.training.precision)
    initialise_model(model, recipe.seed)
    groups = parameter_groups(model.named_parameters(), model.table(), recipe.optimizer.weight_decay)
    optimizer = build_optimizer(recipe.optimizer, groups)
    prepared = open_prepared(load("tiny", f"data.path={folder / 'prepared/tiny'}").data)
    mixture = prepared.mixture(recipe.training.sequence_length, recipe.seed)
    rows = recipe.training.rows_per_step
    losses = []
    for step in range(steps):
        samples = [mixture.sample(step * rows + row) for row in range(rows)]
        tokens, targets, starts = (torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))
        out = model(tokens, starts, targets)
        valid = (targets != -100).sum()
        loss = (out.nll.sum() + sum(out.losses.values())) / valid
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(out.nll.detach().sum() / valid))
    assert losses[-1] < losses[0] - 0.5, losses


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_trains_from_the_command_line(name: str, folder: Path):
    braid("train", name, cwd=folder)
    losses = [line["loss"] for line in curve(folder / "runs" / name)]
    assert len(losses) == 16 and losses[-1] < losses[0] - 1.5


def test_a_wrong_name_is_answered_by_the_family_or_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean samba-1\.3b or samba-1\.7b or samba-3\.8b or samba-421m\?$"):
        find_recipe("samba")
    with pytest.raises(ValueError, match=r"did you mean samba-421m\?$"):
        find_recipe("samba-412m")
    with pytest.raises(ValueError, match=r"did you mean nemotron-h-8b\?$"):
        find_recipe("nemotron")


def test_the_table_of_recipes_names_each_of_them():
    text = (FOLDER / "README.md").read_text()
    missing = [name for name in shipped() if f"`{name}`" not in text]
    assert not missing
