"""Run folders without training, and an environment that has torch and transformers and nothing else, for tests."""

import importlib.metadata
import os
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from packaging.requirements import Requirement

from data.files import sha256_of
from data.tokenizer import train_sentencepiece
from launch.recipes import find_recipe
from model.config import ModelConfig
from model.hybrid import HybridLM, initialise_model
from model.layers.attention import AttentionConfig
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig
from tests.contracts.examples import EXAMPLES, shake
from tests.data.corpus import text
from tests.model.weights.layouts import write_simple
from train.config import load_recipe

CORPUS = [text(seed) for seed in range(30)]
VOCABULARY = 400


def every_kind(**changes: object) -> ModelConfig:
    """One layer of every example of every kind."""
    letters = [letter for letter in string.ascii_letters if letter != "x"][: len(EXAMPLES)]
    layers = dict(zip(letters, EXAMPLES.values(), strict=True))
    values = {"vocab_size": VOCABULARY, "d_model": 32, "pattern": "".join(layers), "layers": layers}
    return ModelConfig(**(values | changes))


def composed(**changes: object) -> ModelConfig:
    """Every layer, parallel branches with and without a gate, and weights that are shared between places."""
    pattern = f"{every_kind().pattern}[ad]fh[bei]fh"
    return every_kind(**({"pattern": pattern, "shared": "fh", "branch_gates": {"d": 0.5}} | changes))


def nemotron_like(**changes: object) -> ModelConfig:
    """A braid that transformers' own NemotronH can express: grouped state, grouped heads."""
    layers = {
        "M": Mamba2Config(head_dim=8, d_state=16, n_groups=2, chunk=16),
        "*": AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16, rope_theta=None),
        "-": MLPConfig(d_hidden=48, activation="relu2", gated=False),
    }
    values = {"vocab_size": VOCABULARY, "d_model": 32, "pattern": "M-M*-", "layers": layers, "tie_embeddings": False}
    return ModelConfig(**(values | changes))


def make_run(folder: Path, config: ModelConfig, tokenizer: Path | None = None) -> Path:
    """A run folder whose only checkpoint holds random, lively weights. tokenizer: its file, or one is trained."""
    recipe = replace(load_recipe(find_recipe("tiny")), name=folder.name, model=config)
    folder.mkdir(parents=True)
    if tokenizer is None:
        path = folder / "tokenizer.model"
        path.write_bytes(train_sentencepiece(CORPUS, config.vocab_size))
    else:
        path = folder / tokenizer.name
        path.write_bytes(tokenizer.read_bytes())
    model = HybridLM(config)
    initialise_model(model, seed=3)
    shake(model, seed=3)
    table = model.table()
    values = {name: value.detach()[: table[name].shape[0]] for name, value in model.named_parameters()}
    extra = {
        "model": config.to_dict(),
        "recipe": recipe.to_dict(),
        "clock": {"step": 16, "tokens": 8192},
        "stream": {"fingerprint": "0" * 64, "mixture": {"sources": [{"folder": "prepared", "data": "1" * 64}]}},
        "tokenizer": {"file": path.name, "sha256": sha256_of(path)},
    }
    write_simple(folder / "checkpoints" / "tokens-000000008192", values, extra)
    (folder / "recipe.json").write_text(recipe.to_json())
    return folder


def only(folder: Path, *names: str) -> dict[str, str]:
    """An environment in which Python finds the named distributions, what they require, and nothing else."""
    pending, seen = [importlib.metadata.distribution(name) for name in names], set()
    folder.mkdir()
    while pending:
        found = pending.pop()
        if found.name.lower() in seen:
            continue
        seen.add(found.name.lower())
        for entry in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / entry
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(entry))).resolve())
        for line in found.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(importlib.metadata.distribution(requirement.name))
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    return kept | {
        "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder.parent / "modules"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def run_alone(environment: dict[str, str], script: Path, *arguments: object) -> str:
    """`python script arguments` without site-packages; returns the last line that it printed."""
    command = [sys.executable, "-S", "-P", str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=script.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]
