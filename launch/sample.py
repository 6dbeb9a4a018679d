"""Text from a trained run: `braid generate`."""

from collections.abc import Iterator
from pathlib import Path

import torch

from data.tokenizer import Tokenizer, load_tokenizer
from model.generate import Sampling, generate
from model.hybrid import HybridLM, Precision
from model.load import load_model
from model.weights.reader import Checkpoint
from train.checkpoint.transaction import open_newest


def load_run(run: Path, precision: Precision = Precision()) -> tuple[HybridLM, Tokenizer, Checkpoint]:
    """The model of a run's newest checkpoint and its tokenizer, checked to be the one that it was trained with.

    run: a run folder, or one checkpoint folder of it. Raises ValueError when either is missing or does not match.
    """
    if not run.is_dir():
        raise ValueError(f"run: {run} is no folder, wants a run such as runs/quickstart")
    single = (run / "manifest.json").exists()
    checkpoint = Checkpoint(run) if single else open_newest(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"run: {run} holds no checkpoint yet, wants one saved by braid train")
    saved = checkpoint.extra["tokenizer"]
    path = checkpoint.folder.parents[1] / saved["file"]
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != saved["sha256"]:
        raise ValueError(
            f"tokenizer: {path} has SHA-256 {tokenizer.sha256[:12]}, the run was trained with {saved['sha256'][:12]}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(checkpoint, precision, device), tokenizer, checkpoint


def sample(run: Path, prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int) -> Iterator[str]:
    """Yields the continuation of `prompt` in pieces of text."""
    model, tokenizer, _ = load_run(run, Precision(torch.bfloat16, torch.float32))
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    steps = generate(model, [ids], max_tokens, Sampling(temperature, top_p), stop=tokenizer.eos, seed=seed)
    produced = (step[0] for step in steps)
    yield from tokenizer.stream(token for token in produced if token is not None)
