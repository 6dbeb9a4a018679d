"""Recipes: what is shipped loads, what is wrong is said in one line with its key."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from launch.recipes import FOLDER, shipped
from model.hybrid import parameter_count
from train import config
from train.config import ConfigError, Recipe, load_recipe
from train.engine import Placement
from train.muon import MuonConfig
from train.optim import AdamWConfig
from train.schedule import WSD, Cosine

TINY = FOLDER / "tiny.toml"


def refused(*overrides: str, path: Path = TINY) -> str:
    """The one line that refuses a recipe."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_load_and_survive_json(name: str):
    recipe = load_recipe(FOLDER / f"{name}.toml")
    assert recipe.name == name
    text = recipe.to_json()
    assert Recipe.from_json(text) == recipe
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_the_quickstart_is_a_samba_of_about_ten_million_parameters():
    recipe = load_recipe(FOLDER / "quickstart.toml")
    assert recipe.model.stack == "M-W-" * 4
    assert recipe.training.sequence_length == 1024
    assert 9e6 < parameter_count(recipe.model) < 11e6


def test_overrides_are_resolved_and_stored():
    recipe = load_recipe(TINY, ["training.tokens=4_096", "model.layers.M.d_state=4", "name=other", "runs=elsewhere"])
    assert recipe.training.tokens == 4096
    assert recipe.model.layers["M"].d_state == 4
    assert recipe.folder == Path("elsewhere/other")
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_section_of_another_kind_replaces_the_old_one():
    assert isinstance(load_recipe(TINY).schedule, WSD)
    assert load_recipe(TINY, ['schedule={kind = "cosine"}']).schedule == Cosine()
    assert "schedule.decay_tokens: unknown key for kind cosine" in refused(
        "schedule.kind=cosine", "schedule.decay_tokens=1"
    )


def test_an_optimizer_without_a_kind_is_adamw():
    """Recipes from before there was another one go on as they were; one word makes Muon of them."""
    assert load_recipe(TINY).optimizer == AdamWConfig(3e-3)
    assert load_recipe(TINY, ["optimizer.kind=muon", "parallel.zero_stage=0"]).optimizer == MuonConfig(3e-3)


def test_derived_numbers():
    training = load_recipe(TINY, ["training.compute_dtype=bfloat16"]).training
    assert training.tokens_per_step == training.rows_per_step * training.sequence_length
    assert training.precision.compute is torch.bfloat16
    assert training.precision.residual is training.reduction is torch.float32
    assert load_recipe(TINY, ["training.checkpoint_blocks=-M"]).training.checkpoint_blocks == "-M"


def test_a_rank_alone_has_nobody_to_share_with():
    """It would copy weights and gradients for nothing; where states lie in host memory, that is still wanted."""
    parallel = load_recipe(TINY, ["parallel.zero_stage=3", "parallel.hpz_ranks=2", "parallel.overlap=true"]).parallel
    assert parallel.in_force(1) == (0, Placement())
    assert parallel.in_force(4) == (3, Placement(hpz_ranks=2, overlap=True))
    offloaded = load_recipe(TINY, ["parallel.zero_stage=2", "parallel.offload_optimizer=true"]).parallel
    assert offloaded.in_force(1) == (2, Placement(offload_optimizer=True))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.sequence_length=0", "training.sequence_length: got 0, wants a positive integer"),
        ("training.micro_batch_rows=-1", "training.micro_batch_rows: got -1, wants a positive integer"),
        ("training.tokens=1e6", "training.tokens: got 1000000.0, wants an integer"),
        ("training.tokens=3", "training.tokens: got 3, wants one step (512) or more"),
        ("training.clip_norm=-1.0", "training.clip_norm: got -1.0, wants a positive number, or 0 for no clipping"),
        ("training.clip_norm=nan", "training.clip_norm: got nan, wants a number"),
        ("training.compute_dtype=fp8", "training.compute_dtype: got 'fp8', wants one of float32, bfloat16"),
        ("training.toknes=1", "training.toknes: unknown key; did you mean training.tokens?"),
        ("training.learning_rate=1.0", "training.learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        ("trainign.tokens=1", "trainign: unknown key; did you mean training?"),
        ("training.backends.ssd=cuda", "training.backends.ssd: got 'cuda', wants auto or one of mamba_ssm, native"),
        ("training.backends.sdd=torch", "training.backends.sdd: got 'torch' for an unknown op, wants one of activ"),
        ("parallel.zero_stage=4", "parallel.zero_stage: got 4, wants one of 0, 1, 2, 3"),
        ("parallel.offload_optimizer=1", "parallel.offload_optimizer: got 1, wants true or false"),
        ("parallel.hpz_ranks=2", "parallel.hpz_ranks: got 2, wants none, or zero_stage 3"),
        ("parallel.overlap=yes", "parallel.overlap: got 'yes', wants true or false or none"),
        (
            "training.checkpoint_blocks=MX",
            "training.checkpoint_blocks: got 'MX', wants true, false, or some of th",
        ),
        (
            'training.checkpoint_blocks=""',
            "training.checkpoint_blocks: got '', wants true, false, or letters of th",
        ),
        ("parallel.device=gpu", "parallel.device: got 'gpu', wants one of auto, cpu, cuda"),
        ("parallel.buckets.live=0", "parallel.buckets.live: got 0, wants a positive number of elements"),
        ("parallel.timeout_s=0", "parallel.timeout_s: got 0.0, wants a positive number of seconds"),
        ("checkpoints.every_tokens=0", "checkpoints.every_tokens: got 0, wants a positive number of tokens, or none"),
        ("checkpoints.keep_last=0", "checkpoints.keep_last: got 0, wants a positive integer"),
        ("checkpoints.resume=maybe", "checkpoints.resume: got 'maybe', wants one of auto, required, never"),
        ("evaluation.max_tokens=0", "evaluation.max_tokens: got 0, wants a positive number of tokens, or none"),
        ("generation.top_p=0", "generation.top_p: got 0.0, wants a number above 0 and at most 1"),
        ("generation.max_tokens=0", "generation.max_tokens: got 0, wants a positive integer"),
        ("generation.temperature=-1", "generation.temperature: got -1.0, wants 0 (greedy) or more"),
        ("logging.wandb_mode=on", "logging.wandb_mode: got 'on', wants one of online, offline"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: got 0.0, wants a positive number"),
        ("optimizer.kind=sgd", "optimizer.kind: got 'sgd', wants one of adamw, muon"),
        ("optimizer.momentum=0.9", "optimizer.momentum: unknown key; optimizer has learning_rate, betas, eps, weight"),
        ('optimizer={kind="muon"}', "optimizer.learning_rate: missing, wants a number"),
        ('optimizer={kind="muon", learning_rate=1.0, momentum=1.0}', "optimizer.momentum: got 1.0, wants a number in"),
        ('optimizer={kind="muon", learning_rate=1.0, ns_step=5}', "optimizer.ns_step: unknown key for kind muon; did"),
        ("name=a/b", "name: got 'a/b', wants a folder name of letters, digits, '.', '_' and '-'"),
        ("seed=-1", "seed: got -1, wants an integer that is not negative"),
        ("model.layers.M.kind=mamba3", "model.layers.M.kind: got 'mamba3', wants one of mamba2, "),
        ("model.layers.M.d_stat=1", "model.layers.M.d_stat: unknown key for kind mamba2; did you mean"),
        ("model.layers.M.head_dim=7", "model.layers.M.head_dim: got 7, wants a divisor of the inner width 64"),
        ("model.pattern=MX", "model.pattern: 'M>>X<<': unknown letter; the recipe names 'M', 'W', '-'"),
        ("model.vocab_size=0", "model.vocab_size: got 0, wants a positive number"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_is_right(override: str, line: str):
    assert refused(override).startswith(f"command line: {line}")


def test_sections_that_do_not_fit_together_are_refused():
    assert "schedule.decay_tokens: got 99999, wants at most 8192 with the 819 of warm-up" in refused(
        "schedule.decay_tokens=99999"
    )
    assert "parallel.offload_optimizer: got True, wants false, or zero_stage 1, 2 or 3" in refused(
        "parallel.zero_stage=0", "parallel.offload_optimizer=true"
    )
    assert "parallel.overlap: got True, wants false or none, or zero_stage 1, 2 or 3" in refused(
        "parallel.zero_stage=0", "parallel.overlap=true"
    )
    load_recipe(TINY, ["parallel.zero_stage=0", "parallel.overlap=false"])
    assert "parallel.hpz_ranks: got 1, wants 2 or more ranks, or none" in refused(
        "parallel.zero_stage=3", "parallel.hpz_ranks=1"
    )
    assert "parallel.hpz_ranks: got 2, wants none beside tensor ranks" in refused(
        "parallel.zero_stage=3", "parallel.hpz_ranks=2", "parallel.tensor=2"
    )
    with pytest.raises(ConfigError, match=r"parallel\.hpz_ranks: got 3, wants a divisor of the 8 ranks: 2"):
        load_recipe(TINY, ["parallel.zero_stage=3", "parallel.hpz_ranks=3"]).check_ranks(8)
    assert refused("optimizer.kind=muon", "parallel.zero_stage=2") == (
        "command line: parallel.zero_stage: got 2, wants 0: optimizer.kind muon orthogonalises whole matrices, "
        "which this stage flattens and cuts"
    )
    with pytest.raises(ConfigError, match=r"training\.rows_per_step: got 8, wants a multiple of the 3 ranks"):
        load_recipe(TINY).check_ranks(3)


def test_mistakes_in_the_file_name_the_file(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    assert refused(path=path) == f"{path}: no such recipe file"
    path.write_text(TINY.read_text().replace("sequence_length = 64", "sequence_lenght = 64"))
    assert refused(path=path) == (
        f"{path}: training.sequence_lenght: unknown key; did you mean training.sequence_length?"
    )
    path.write_text("".join(line for line in TINY.read_text().splitlines(True) if "sequence_length" not in line))
    assert refused(path=path) == f"{path}: training.sequence_length: missing, wants an integer"
    path.write_text('name = "x"\n[model\n')
    assert re.fullmatch(rf"{path}: not valid TOML: .* \(at line 2, column 7\)", refused(path=path))
    path.write_bytes(b'name = "\xff"')
    assert refused(path=path) == f"{path}: not valid UTF-8 at byte 8"


def test_a_stored_recipe_that_cannot_be_read_says_where():
    with pytest.raises(ConfigError, match=r"^recipe\.json: not valid JSON"):
        Recipe.from_json("{")
    with pytest.raises(ConfigError, match=r"^here: name: missing, wants a string"):
        Recipe.from_json("{}", "here")


def test_every_key_of_the_run_is_explained():
    sections = [item for item in vars(config).values() if dataclasses.is_dataclass(item)]
    ours = [section for section in sections if section.__module__ == config.__name__]
    assert Recipe in ours
    for section in ours:
        for field in dataclasses.fields(section):
            nested = dataclasses.is_dataclass(field.type) or field.name in ("schedule", "buckets")
            assert nested or f"{field.name}:" in section.__doc__, f"{section.__name__}.{field.name}"
