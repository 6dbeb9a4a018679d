"""Memory of a training step, and prefill and decoding at a long context, on the shapes of `train_hybrids.py`.

The Llama has the same width, vocabulary and number of sublayers: 8 decoder layers with 8 query and 4 key/value heads
and SwiGLU of 1,536, 33.6M parameters.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.bench.row import Reading, Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.config import Recipe

CONTEXT, QUICK_CONTEXT = 16384, 2048
STEPS = 16
"""Tokens decoded a round."""
SAMBA = (
    'model.pattern="(M-W-)x4"',
    'model.layers={M={kind="mamba2", head_dim=64, d_state=128}, W={kind="attention", n_heads=8, window=1024}, '
    '"-"={kind="mlp", d_hidden=1536}}',
)


# ---- memory ----


def memory_ours(quick: bool) -> Iterator[Reading]:
    from launch.bench.rows.train_hybrids import nemotron_h
    from launch.bench.training import braid

    return _peaks(braid(nemotron_h(), 1))


def memory_peer(quick: bool) -> Iterator[Reading]:
    """In bfloat16 weights: the lighter of the ways to train it."""
    import torch

    from launch.bench.rows.train_hybrids import hf_nemotron_h, nemotron_h
    from launch.bench.training import peer_step

    def steps() -> Iterator[Reading]:
        recipe = nemotron_h()
        step = peer_step(recipe, hf_nemotron_h(recipe), "bf16 weights", torch.device("cpu"))
        while True:
            step()
            yield Reading(0.0)

    return _peaks(steps())


def _peaks(steps: Iterator[Reading]) -> Iterator[Reading]:
    """GiB that the process holds at most during each step, less what it held before the model was made."""
    import transformers  # noqa: F401  (both sides hold the same libraries)

    import train.engine  # noqa: F401

    before = _resident("VmRSS")
    for _ in steps:
        yield Reading((_resident("VmHWM") - before) / 2**20)
        Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


# ---- prefill and decoding ----


def prefill_ours(quick: bool) -> Iterator[Reading]:
    from launch.bench.rows.train_hybrids import nemotron_h

    return prefill(our_model(nemotron_h()), quick)


def prefill_nemotron_h(quick: bool) -> Iterator[Reading]:
    return prefill(their_model(_nemotron_h()), quick)


def prefill_llama(quick: bool) -> Iterator[Reading]:
    return prefill(their_model(_llama()), quick)


def decode_ours(quick: bool) -> Iterator[Reading]:
    from launch.bench.rows.train_hybrids import nemotron_h

    return decode(our_model(nemotron_h()), _context(quick))


def decode_nemotron_h(quick: bool) -> Iterator[Reading]:
    return decode(their_model(_nemotron_h()), _context(quick))


def decode_llama(quick: bool) -> Iterator[Reading]:
    return decode(their_model(_llama()), _context(quick))


def decode_samba(quick: bool) -> Iterator[Reading]:
    return decode(our_model(_samba()), _context(quick))


def decode_samba_short(quick: bool) -> Iterator[Reading]:
    return decode(our_model(_samba()), _context(quick) // 8)


Advance = Callable[["Tensor", Any], tuple["Tensor", Any]]
"""`advance(tokens (1, T), state) -> (logits of the last token, state)`."""


def _context(quick: bool) -> int:
    return QUICK_CONTEXT if quick else CONTEXT


def _prompt(length: int) -> "Tensor":
    import torch

    return torch.randint(0, 8192, (1, length), generator=torch.Generator().manual_seed(0))


def prefill(advance: Advance, quick: bool) -> Iterator[Reading]:
    prompt = _prompt(_context(quick))
    while True:
        begin = time.perf_counter()
        _wait(advance(prompt, None)[0])
        yield Reading(prompt.shape[1] / (time.perf_counter() - begin))


def decode(advance: Advance, context: int) -> Iterator[Reading]:
    logits, state = advance(_prompt(context), None)
    _wait(logits)
    while True:
        begin = time.perf_counter()
        for _ in range(STEPS):
            logits, state = advance(logits.argmax(-1).view(1, 1), state)
        _wait(logits)
        yield Reading(STEPS / (time.perf_counter() - begin))


def _wait(logits: "Tensor") -> None:
    """Until the device has them."""
    logits[0, 0].item()


def _samba() -> "Recipe":
    from launch.bench.rows.train_hybrids import shaped

    return shaped(*SAMBA)


def our_model(recipe: "Recipe", device: str = "cpu") -> Advance:
    import torch

    from model.hybrid import HybridLM, initialise_model

    model = HybridLM(recipe.model, recipe.training.precision, device=device).eval()
    initialise_model(model, recipe.seed)
    model.store_as_computed()

    @torch.no_grad()
    def advance(tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        tokens = tokens.to(device)
        starts = torch.zeros(tokens.shape, dtype=torch.bool, device=device)
        starts[:, 0] = state is None
        out = model(tokens, starts, state=state, carry=True, last_only=True)
        assert out.logits is not None
        return out.logits[:, -1], out.state

    return advance


def their_model(model: "nn.Module", device: str = "cpu") -> Advance:
    import torch

    model.to(device, torch.bfloat16).eval()

    @torch.no_grad()
    def advance(tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        tokens = tokens.to(device)
        out = model(input_ids=tokens, past_key_values=state, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    return advance


def _nemotron_h() -> "nn.Module":
    from launch.bench.rows.train_hybrids import hf_nemotron_h, nemotron_h

    return hf_nemotron_h(nemotron_h())


def _llama() -> "nn.Module":
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2 * CONTEXT,
            attn_implementation="sdpa",
        )
    )


SHAPE = "M-M-M-*-M-M-M-*- (width 512, 37.1M)"


WEIGHTS = "the peer in bfloat16 weights with SDPA, ours as `braid generate` loads it"
LEVEL = "a ratio of 1: the speed does not depend on the context"
SHORT = "ours after 2,048 tokens"
TRANSFORMERS = ("transformers",)
ROWS = (
    Row(
        name="memory_nemotron_h",
        measures=f"Peak memory of a training step of {SHAPE}, 4 rows of 1,024, weights and optimizer included.",
        unit="GiB",
        higher_is_better=False,
        ours=memory_ours,
        peer=memory_peer,
        peer_name="transformers NemotronH",
        needs=TRANSFORMERS,
        note="the peer and its AdamW in bfloat16, ours float32 weights, gradients and moments through DeepSpeed",
    ),
    Row(
        name="prefill_16k",
        measures=f"Reading a prompt of 16,384 tokens with {SHAPE} (--quick: 2,048).",
        ours=prefill_ours,
        peer=prefill_nemotron_h,
        peer_name="transformers NemotronH",
        needs=TRANSFORMERS,
        note=WEIGHTS,
    ),
    Row(
        name="prefill_16k_llama",
        measures=f"The same with {SHAPE} beside a Transformer of as many sublayers.",
        ours=prefill_ours,
        peer=prefill_llama,
        peer_name="transformers Llama (GQA)",
        needs=TRANSFORMERS,
        note=WEIGHTS,
    ),
    Row(
        name="decode_16k",
        measures=f"Decoding one token at a time after 16,384 tokens with {SHAPE} (--quick: 2,048).",
        ours=decode_ours,
        peer=decode_nemotron_h,
        peer_name="transformers NemotronH",
        needs=TRANSFORMERS,
        note=WEIGHTS,
    ),
    Row(
        name="decode_16k_llama",
        measures=f"The same with {SHAPE} beside a Transformer of as many sublayers.",
        ours=decode_ours,
        peer=decode_llama,
        peer_name="transformers Llama (GQA)",
        needs=TRANSFORMERS,
        note=WEIGHTS,
    ),
    Row(
        name="decode_samba",
        measures="Decoding after 16,384 tokens with a Samba braid (window 1,024) beside the same after 2,048.",
        ours=decode_samba,
        peer=decode_samba_short,
        peer_name=SHORT,
        note=LEVEL,
    ),
)
