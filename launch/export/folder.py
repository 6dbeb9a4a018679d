"""Writes a Hugging Face folder, checks it, and only then gives it its name."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from launch.export.card import card, results_of
from launch.export.flatten import flatten
from launch.export.parity import STEPS, TOLERANCE, Parity, measure
from launch.export.tokenizer import write_tokenizer
from launch.runs import load_run
from model.hf import nemotron_h
from model.hybrid import HybridLM
from model.weights.reader import Checkpoint

RECIPE = "training_recipe.json"
Format = Literal["auto", "braid", "nemotron_h"]


@dataclass(frozen=True)
class Published:
    """format: "braid" or "nemotron_h". why: why not NemotronH's class, None when it is."""

    folder: Path
    format: str
    why: str | None
    parity: Parity
    bytes: int


def export(
    run: Path, folder: Path, *, format: Format, dtype: torch.dtype, shard_gib: float, overwrite: bool = False
) -> Published:
    """Publishes a run's newest checkpoint (or the checkpoint folder `run`) in `folder`.

    format: "auto" takes NemotronH's class where it can express the braid, else the project's own code. dtype: of the
    matrices; vectors stay float32. shard_gib: size of a weight file, at most. overwrite: replace a folder that was
    exported before. Raises ValueError when the folder exists, the format cannot express the braid, or what was written
    does not compute what the run computes.
    """
    if folder.exists() and not (overwrite and (folder / RECIPE).is_file()):
        wants = f"a new folder, or one that holds {RECIPE}" if overwrite else "a new folder, or --overwrite"
        raise ValueError(f"DIR: {folder} exists already, wants {wants}")
    model, tokenizer, checkpoint = load_run(run, device=torch.device("cpu"))
    why = nemotron_h.obstacle(model.config)
    if format == "nemotron_h" and why is not None:
        raise ValueError(f"--format nemotron_h: {why}; --format braid exports any braid")
    native = why is None if format == "auto" else format == "nemotron_h"
    round_matrices(model, dtype)
    with _staged(folder) as staged:
        _write_config(model, tokenizer, checkpoint, staged, native=native, dtype=dtype)
        _write_weights(model, staged, native=native, dtype=dtype, shard_gib=shard_gib)
        write_tokenizer(tokenizer, staged)
        parity = measure(model, tokenizer, staged)
        if not parity.holds:
            raise ValueError(
                f"export: the written model differs from the run: logits by {parity.difference:.1e}, greedy tokens by "
                f"{parity.regret:.1e}, allowed {TOLERANCE * parity.scale:.1e}; nothing was published"
            )
        _write_papers(model, checkpoint, staged, folder.name, native=native, parity=parity)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Published(folder, "nemotron_h" if native else "braid", None if native else why, parity, size)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that becomes it at the end, or disappears."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.parent / f".{folder.name}.{uuid4().hex[:8]}"
    staged.mkdir()
    try:
        yield staged
        old = staged.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        staged.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@torch.no_grad()
def round_matrices(model: HybridLM, dtype: torch.dtype) -> None:
    """Gives every matrix the values that `dtype` can hold, so that the run is compared as it is published."""
    table = model.table()
    for name, parameter in model.named_parameters():
        if table[name].update != "vector":
            parameter.copy_(parameter.to(dtype))


def _write_config(
    model: HybridLM, tokenizer: Tokenizer, checkpoint: Checkpoint, folder: Path, *, native: bool, dtype: torch.dtype
) -> None:
    from transformers import GenerationConfig, NemotronHConfig

    from launch.export.configuration_braid import BraidConfig

    recipe = checkpoint.extra["recipe"]
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    length = recipe["training"]["sequence_length"]
    shared = {**ids, "max_position_embeddings": length, "dtype": str(dtype).removeprefix("torch.")}
    if native:
        config = NemotronHConfig(
            **nemotron_h.configuration(model.config), **shared, architectures=["NemotronHForCausalLM"]
        )
    else:
        config = BraidConfig(
            architecture=model.config.to_dict(),
            residual_dtype=recipe["training"]["residual_dtype"],
            architectures=["BraidForCausalLM"],
            auto_map={
                "AutoConfig": "configuration_braid.BraidConfig",
                "AutoModelForCausalLM": "modeling_braid.BraidForCausalLM",
            },
            **shared,
        )
        for name, source in flatten(model.config).items():
            (folder / name).write_text(source, encoding="utf-8")
    config.save_pretrained(folder)
    sampling: dict[str, Any] = {"do_sample": False}
    wanted = recipe["generation"]
    if wanted["temperature"] > 0:
        sampling = {"do_sample": True, "temperature": wanted["temperature"], "top_p": wanted["top_p"], "top_k": 0}
    GenerationConfig(**ids, **sampling).save_pretrained(folder)


def _write_weights(model: HybridLM, folder: Path, *, native: bool, dtype: torch.dtype, shard_gib: float) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(
        dict(_tensors(model, native, dtype)), folder, max_shard_size=int(shard_gib * 2**30), metadata={"format": "pt"}
    )
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # the library lets its owner alone read it


def _tensors(model: HybridLM, native: bool, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names on disk and logical tensors, padding left out."""
    table = model.table()
    for name, parameter in model.named_parameters():
        spec = table[name]
        value = parameter.detach().to(torch.float32 if spec.update == "vector" else dtype)
        if value.shape != spec.shape:
            value = value[: spec.shape[0]].clone()
        if native:
            yield from nemotron_h.tensors(name, value, model.config)
        else:
            yield f"model.{name}", value


def _write_papers(
    model: HybridLM, checkpoint: Checkpoint, folder: Path, name: str, *, native: bool, parity: Parity
) -> None:
    """The model card and the resolved recipe."""
    recipe, run = checkpoint.extra["recipe"], checkpoint.folder.parents[1]
    begin = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["bos_token"]
    text = card(
        name=name,
        config=model.config,
        recipe=recipe,
        extra=checkpoint.extra,
        begin=begin,
        native=native,
        parity=parity,
        steps=STEPS,
        results=results_of(run, checkpoint.folder.name),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
