"""Does the published folder compute what the run computes? Asked in a process that knows nothing of Braid.

Legend: B rows, T tokens, V vocabulary.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.tokenizer import Tokenizer
from launch.export.tokenizer import PROBES, check_agreement
from model.hybrid import HybridLM

TOLERANCE = 1e-4
"""Of a logit in float32, absolute up to 1 and relative to the largest logit beyond."""

LONGEST = 512
STEPS = 64


@dataclass(frozen=True)
class Parity:
    """difference: largest of any logit. scale: largest logit, at least 1. regret: how much less likely, in logits, the
    folder's greedy tokens are than ours, at most."""

    difference: float
    scale: float
    regret: float

    @property
    def holds(self) -> bool:
        allowed = TOLERANCE * self.scale
        return self.difference <= allowed and self.regret <= allowed


def measure(model: HybridLM, tokenizer: Tokenizer, folder: Path) -> Parity:
    """Compares logits of a text and of random tokens, and 64 greedy tokens decoded with the cache.

    Raises ValueError when the folder cannot be loaded or its tokenizer does not agree.
    """
    length = min(LONGEST, 2 * max([64, *_windows(model)]))
    text = tokenizer.encode("".join(PROBES))
    tokens = _questions(text, tokenizer.bos, length, model.config.vocab_size)
    prompt = tokens[:1, : min(32, length)].clone()
    with tempfile.TemporaryDirectory(prefix="braid-parity-") as scratch:
        questions, answers = Path(scratch) / "questions.safetensors", Path(scratch) / "answers.safetensors"
        asked = {"tokens": tokens, "prompt": prompt, "steps": torch.tensor([STEPS])}
        save_file(asked, questions, {"texts": json.dumps(PROBES)})
        _ask(folder, questions, answers, scratch)
        theirs = load_file(answers)
        with safe_open(answers, "pt") as file:
            said = file.metadata()
    check_agreement(tokenizer, json.loads(said["ids"]), json.loads(said["spelled"]))
    ours = _logits(model, tokens)
    if theirs["logits"].shape != ours.shape:
        raise ValueError(f"export: {folder} gives logits {list(theirs['logits'].shape)}, wants {list(ours.shape)}")
    decoded = torch.cat([prompt, theirs["generated"][None]], 1)
    following = _logits(model, decoded)[0, prompt.shape[1] - 1 : -1]
    chosen = following.gather(-1, theirs["generated"][:, None]).squeeze(-1)
    difference = (theirs["logits"] - ours).abs().max().item()
    return Parity(difference, max(1.0, ours.abs().max().item()), (following.amax(-1) - chosen).max().item())


def _windows(model: HybridLM) -> list[int]:
    windows = (getattr(layer, "window", None) for layer in model.config.stacked)
    return [window for window in windows if window is not None]


def _questions(text: list[int], begin: int, length: int, vocab_size: int) -> Tensor:
    """(2, length): a text over and over, and random tokens."""
    repeated = (text * (length // max(len(text), 1) + 1))[:length]
    random = torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    rows = torch.stack([torch.tensor(repeated), random])
    rows[:, 0] = begin
    return rows


@torch.no_grad()
def _logits(model: HybridLM, tokens: Tensor) -> Tensor:
    """(B, T, V) float32, row by row."""
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    device = next(model.parameters()).device
    rows = zip(tokens.to(device).split(1), starts.to(device).split(1), strict=True)
    return torch.cat([model(row, start).logits.cpu() for row, start in rows])


def _ask(folder: Path, questions: Path, answers: Path, scratch: str) -> None:
    probe = Path(__file__).with_name("probe.py")
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = kept | {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", str(probe), str(folder.resolve()), str(questions), str(answers)]
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ValueError(f"export: transformers cannot load what was written: {last[0]}")
