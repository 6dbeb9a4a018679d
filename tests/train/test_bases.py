"""Recipes that build on others: what is inherited, what is not, and mistakes that name the file that they are in."""

from pathlib import Path

import pytest

from model.layers.mlp import MLPConfig
from train.bases import SHIPPED
from train.config import ConfigError, Recipe, load_recipe
from train.schedule import Cosine


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_is_its_base_but_for_what_it_says(tmp_path: Path):
    mine = load_recipe(write(tmp_path / "mine.toml", 'base = "tiny"\nname = "mine"\n[model]\nd_model = 48'))
    changed = load_recipe(SHIPPED / "tiny.toml", ["name=mine", "model.d_model=48"])
    assert mine == changed
    assert Recipe.from_json(mine.to_json()) == mine


def test_a_base_lies_beside_the_recipe_or_is_a_path_or_shipped(tmp_path: Path):
    write(tmp_path / "tiny.toml", f'base = "{SHIPPED}/tiny.toml"\nname = "tiny"\nseed = 7')
    middle = write(tmp_path / "middle.toml", 'base = "tiny"\nname = "middle"\n[optimizer]\nweight_decay = 0.5')
    recipe = load_recipe(write(tmp_path / "top.toml", 'base = "middle.toml"\nname = "top"'), ["seed=8"])
    assert (recipe.name, recipe.seed, recipe.optimizer.weight_decay) == ("top", 8, 0.5)
    assert load_recipe(middle).seed == 7


def test_another_kind_replaces_a_section_and_none_takes_a_layer_out(tmp_path: Path):
    text = 'base = "tiny"\nname = "x"\n[model]\npattern = "M"\n[model.layers]\nW = "none"\n'
    recipe = load_recipe(
        write(tmp_path / "x.toml", f'{text}M = {{kind = "mlp", d_hidden = 8}}\n[schedule]\nkind = "cosine"')
    )
    assert recipe.model.layers["M"] == MLPConfig(8)
    assert set(recipe.model.layers) == {"M", "-"}
    assert recipe.schedule == Cosine()


def test_a_name_is_not_inherited(tmp_path: Path):
    """The run would go on in its base's folder."""
    path = write(tmp_path / "mine.toml", 'base = "tiny"')
    assert refused(path) == f"{path}: name: missing, wants a string"


def test_a_mistake_names_the_file_that_it_is_in(tmp_path: Path):
    below = write(tmp_path / "below.toml", 'base = "tiny"\nname = "below"\n[training]\ntokns = 3')
    path = write(tmp_path / "mine.toml", 'base = "below"\nname = "mine"\n[training]\ntokens = 4096')
    assert refused(path) == f"{below}: training.tokns: unknown key; did you mean training.tokens?"
    write(below, 'base = "tiny"\nname = "below"')
    assert refused(path, "training.tokns=3").startswith("command line: training.tokns: unknown key")
    write(path, 'base = "below"\nname = "mine"\n[training]\ntokens = 3')
    assert refused(path) == f"{path}: training.tokens: got 3, wants one step (512) or more"
    write(below, "base = ")
    assert refused(path).startswith(f"{below}: not valid TOML")


@pytest.mark.parametrize(
    ("base", "line"),
    [
        ('"quikstart"', "base: got 'quikstart', wants a path, or the name of a recipe beside it or of a shipped one"),
        ('"quikstart"', "did you mean quickstart?"),
        ("3", "base: got 3, wants the name of a recipe or a path, as a string"),
        ('"mine"', "base: got 'mine', which builds on this recipe"),
    ],
)
def test_a_base_that_cannot_be_is_refused(tmp_path: Path, base: str, line: str):
    path = write(tmp_path / "mine.toml", f'base = {base}\nname = "mine"')
    assert line in refused(path)
    assert refused(path).startswith(f"{path}: ")
