"""Prefill, step and sample with recurrent state: memory stays constant in the generated length for windowed braids.

Legend: B prompts, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.hybrid import HybridLM
from model.layers.base import require


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 for greedy. top_p: keep the smallest set of tokens with at least this probability. top_k: keep
    the k likeliest, 0 for all."""

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0 and at most 1")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")

    def pick(self, logits: Tensor, *generators: torch.Generator) -> Tensor:
        """logits: (B, V) float32. generators: one for all rows, or one each. Returns (B,) int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        values, order = (logits / self.temperature).sort(-1, descending=True)
        probabilities = values.softmax(-1)
        drop = probabilities.cumsum(-1) - probabilities >= self.top_p
        if self.top_k:
            drop[:, self.top_k :] = True
        kept = probabilities.masked_fill(drop, 0.0)
        shares = kept.split(len(kept) // len(generators))
        drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(shares, generators, strict=True)]
        return order.gather(-1, torch.cat(drawn)).squeeze(-1)


@torch.no_grad()
def generate(
    model: HybridLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    *,
    stop: int | None = None,
    seed: int | Sequence[int] = 0,
) -> Iterator[list[int | None]]:
    """Yields, token by token, the next id of every prompt; None for prompts that have ended.

    prompts: token ids, each beginning with the token that begins a document. stop: id that ends a prompt (yielded as
    None). Shorter prompts are padded on the left with a document of their own, which no layer lets them see. Sampling
    draws on the CPU from `seed`: one for all prompts, or one each, so that no prompt's text depends on the others.
    """
    if not prompts or not all(prompts):
        raise ValueError("prompt: got an empty one, wants at least one token")
    device = next(model.parameters()).device
    seeds = [seed] if isinstance(seed, int) else seed
    generators = [torch.Generator().manual_seed(number) for number in seeds]
    tokens, starts = pad_left(prompts)
    logits, state = _advance(model, tokens.to(device), starts.to(device), None)
    alive = [True] * len(prompts)
    for produced in range(max_tokens):
        ids = sampling.pick(logits.cpu(), *generators)
        alive = [a and i != stop for a, i in zip(alive, ids.tolist(), strict=True)]
        yield [i if a else None for a, i in zip(alive, ids.tolist(), strict=True)]
        if not any(alive) or produced + 1 == max_tokens:
            return
        step = ids[:, None].to(device)
        logits, state = _advance(model, step, torch.zeros_like(step, dtype=torch.bool), state)


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and starts, (B, T), of prompts that end together. Padding is a document of its own."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    starts = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        first = longest - len(prompt)
        tokens[row, first:] = torch.tensor(prompt)
        starts[row, 0] = starts[row, first] = True
    return tokens, starts


def _advance(model: HybridLM, tokens: Tensor, starts: Tensor, state: object) -> tuple[Tensor, object]:
    out = model(tokens, starts, state=state, carry=True, last_only=True)
    return out.logits[:, -1], out.state
