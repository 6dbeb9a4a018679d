"""Text from a trained run: `braid generate`."""

from collections.abc import Iterator
from pathlib import Path

import torch

from launch.runs import load_run
from model.generate import Sampling, generate
from model.hybrid import Precision


def sample(run: Path, prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int) -> Iterator[str]:
    """Yields the continuation of `prompt` in pieces of text."""
    model, tokenizer, _ = load_run(run, Precision(torch.bfloat16, torch.float32))
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    steps = generate(model, [ids], max_tokens, Sampling(temperature, top_p), stop=tokenizer.eos, seed=seed)
    produced = (step[0] for step in steps)
    yield from tokenizer.stream(token for token in produced if token is not None)
