"""Text from a trained run: `braid generate`."""

from collections.abc import Iterator
from pathlib import Path

import torch

from launch.runs import load_run
from model.generate import Sampling, generate
from model.hybrid import Precision
from model.weights.reader import Checkpoint
from train.config import GenerationConfig

SAMPLES = "samples.md"


def sample(run: Path, settings: GenerationConfig) -> tuple[Checkpoint, Iterator[str]]:
    """The checkpoint that speaks, and the continuation of the prompt in pieces of text."""
    model, tokenizer, checkpoint = load_run(run, Precision(torch.bfloat16, torch.float32))
    ids = [tokenizer.bos, *tokenizer.encode(settings.prompt)]
    sampling = Sampling(settings.temperature, settings.top_p)
    steps = generate(model, [ids], settings.max_tokens, sampling, stop=tokenizer.eos, seed=settings.seed)
    produced = (step[0] for step in steps)
    return checkpoint, tokenizer.stream(token for token in produced if token is not None)


def keep(checkpoint: Checkpoint, settings: GenerationConfig, text: str) -> Path:
    """Adds a text, prompt included, to the run's `samples.md`; returns its path."""
    path = checkpoint.folder.parents[1] / SAMPLES
    asked = f"temperature {settings.temperature:g}, top_p {settings.top_p:g}, seed {settings.seed}"
    quoted = "".join(f"    {line}\n" for line in text.splitlines())
    with path.open("a", encoding="utf-8") as file:
        file.write(f"## {checkpoint.folder.name}: {asked}\n\n{quoted}\n")
    return path
