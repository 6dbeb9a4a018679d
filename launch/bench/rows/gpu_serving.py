"""Prefill and decoding at a context of 16,384 on a GPU, with the hybrid of `gpu_training.py` (1.4B)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launch.bench.row import Reading, Row

if TYPE_CHECKING:
    from launch.bench.rows.serving import Advance
    from train.config import Recipe

CONTEXT = 16384


def prefill_ours(quick: bool) -> Iterator[Reading]:
    from launch.bench.rows.serving import prefill

    return prefill(_ours(_hybrid()), quick)


def prefill_theirs(quick: bool) -> Iterator[Reading]:
    from launch.bench.rows.serving import prefill

    return prefill(_theirs(), quick)


def decode_ours(quick: bool) -> Iterator[Reading]:
    from launch.bench.rows.serving import decode

    return decode(_ours(_hybrid()), CONTEXT)


def decode_theirs(quick: bool) -> Iterator[Reading]:
    from launch.bench.rows.serving import decode

    return decode(_theirs(), CONTEXT)


def decode_samba(quick: bool) -> Iterator[Reading]:
    from launch.bench.rows.serving import decode

    return decode(_ours(_samba()), CONTEXT)


def decode_samba_short(quick: bool) -> Iterator[Reading]:
    from launch.bench.rows.serving import decode

    return decode(_ours(_samba()), CONTEXT // 8)


def _hybrid() -> "Recipe":
    from launch.bench.rows.gpu_training import nemotron_h

    return nemotron_h()


def _samba() -> "Recipe":
    from launch.recipes import FOLDER
    from train.config import load_recipe

    return load_recipe(FOLDER / "samba-421m.toml", [])


def _ours(recipe: "Recipe") -> "Advance":
    from launch.bench.rows.serving import our_model

    return our_model(recipe, "cuda")


def _theirs() -> "Advance":
    from launch.bench.rows.gpu_training import build_hf_nemotron_h
    from launch.bench.rows.serving import their_model

    return their_model(build_hf_nemotron_h(_hybrid()), "cuda")


def _row(name: str, measures: str, ours: Any, peer: Any, peer_name: str, note: str, needs: tuple[str, ...] = ()) -> Row:
    return Row(
        name=name,
        measures=measures,
        unit="tokens/s",
        higher_is_better=True,
        ours=ours,
        peer=peer,
        peer_name=peer_name,
        needs=needs,
        note=note,
        cuda=True,
    )


HYBRID = "(M-M-M-*-)x5 (width 2,048, 1.4B)"
WEIGHTS = "the peer in bfloat16 weights with SDPA, ours as `braid generate` loads it"
ROWS = (
    _row(
        "gpu_prefill_16k",
        f"Reading a prompt of 16,384 tokens with {HYBRID} (--quick: 2,048).",
        prefill_ours,
        prefill_theirs,
        "transformers NemotronH",
        WEIGHTS,
        ("transformers",),
    ),
    _row(
        "gpu_decode_16k",
        f"Decoding one token at a time after 16,384 tokens with {HYBRID}.",
        decode_ours,
        decode_theirs,
        "transformers NemotronH",
        WEIGHTS,
        ("transformers",),
    ),
    _row(
        "gpu_decode_samba",
        "Decoding after 16,384 tokens with samba-421m (window 2,048) beside the same after 2,048.",
        decode_samba,
        decode_samba_short,
        "ours after 2,048 tokens",
        "a ratio of 1: the speed does not depend on the context",
    ),
)
