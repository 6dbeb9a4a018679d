"""Prefill and decoding at a context of 16,384 on a GPU, with the hybrid of `gpu_training.py` (1.4B)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from launch.bench.row import Reading, Row
from launch.bench.rows.serving import LEVEL, SHORT, WEIGHTS, decode, our_model, prefill, their_model

if TYPE_CHECKING:
    from launch.bench.rows.serving import Advance
    from train.config import Recipe

CONTEXT = 16384


def prefill_ours(quick: bool) -> Iterator[Reading]:
    return prefill(_ours(_hybrid()), quick)


def prefill_theirs(quick: bool) -> Iterator[Reading]:
    return prefill(_theirs(), quick)


def decode_ours(quick: bool) -> Iterator[Reading]:
    return decode(_ours(_hybrid()), CONTEXT)


def decode_theirs(quick: bool) -> Iterator[Reading]:
    return decode(_theirs(), CONTEXT)


def decode_samba(quick: bool) -> Iterator[Reading]:
    return decode(_ours(_samba()), CONTEXT)


def decode_samba_short(quick: bool) -> Iterator[Reading]:
    return decode(_ours(_samba()), CONTEXT // 8)


def _hybrid() -> "Recipe":
    from launch.bench.rows.gpu_training import nemotron_h

    return nemotron_h()


def _samba() -> "Recipe":
    from launch.recipes import FOLDER
    from train.config import load_recipe

    return load_recipe(FOLDER / "samba-421m.toml", [])


def _ours(recipe: "Recipe") -> "Advance":
    return our_model(recipe, "cuda")


def _theirs() -> "Advance":
    from launch.bench.rows.gpu_training import build_hf_nemotron_h

    return their_model(build_hf_nemotron_h(_hybrid()), "cuda")


HYBRID = "(M-M-M-*-)x5 (width 2,048, 1.4B)"
ROWS = (
    Row(
        name="gpu_prefill_16k",
        measures=f"Reading a prompt of 16,384 tokens with {HYBRID} (--quick: 2,048).",
        ours=prefill_ours,
        peer=prefill_theirs,
        peer_name="transformers NemotronH",
        needs=("transformers",),
        note=WEIGHTS,
        cuda=True,
    ),
    Row(
        name="gpu_decode_16k",
        measures=f"Decoding one token at a time after 16,384 tokens with {HYBRID}.",
        ours=decode_ours,
        peer=decode_theirs,
        peer_name="transformers NemotronH",
        needs=("transformers",),
        note=WEIGHTS,
        cuda=True,
    ),
    Row(
        name="gpu_decode_samba",
        measures="Decoding after 16,384 tokens with samba-421m (window 2,048) beside the same after 2,048.",
        ours=decode_samba,
        peer=decode_samba_short,
        peer_name=SHORT,
        note=LEVEL,
        cuda=True,
    ),
)
