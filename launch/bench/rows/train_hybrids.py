"""Training steps of published shapes beside Hugging Face's own classes, which start from the same weights.

`train_nemotron_h`: Mamba-2, squared-ReLU MLPs and two attention layers without positions, 37.1M parameters.
`train_mamba2`: sixteen Mamba-2 layers and nothing else, 35.9M.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from launch.bench.row import Reading, Row, Side

if TYPE_CHECKING:
    from torch import nn

    from model.config import ModelConfig
    from train.config import Recipe

STEPS, QUICK_STEPS = 2, 1
PEER_CHUNK = 64
"""Tokens per chunk of the peers' scan: on the CPU their fastest of 64, 128 and 256."""

MAMBA2 = 'M={kind="mamba2", head_dim=64, d_state=128}'
ATTENTION = '"*"={kind="attention", n_heads=8, n_kv_heads=4, rope_theta="none"}'
MLP = '"-"={kind="mlp", d_hidden=2048, activation="relu2", gated=false}'
SHAPE = (
    "model.d_model=512",
    "model.vocab_size=8192",
    "model.tie_embeddings=false",
    "training.sequence_length=1024",
    "training.rows_per_step=4",
    "training.micro_batch_rows=4",
    "schedule.warmup_fraction=0.0",
    "optimizer.learning_rate=1e-3",
)


def nemotron_h() -> "Recipe":
    return shaped('model.pattern="M-M-M-*-M-M-M-*-"', f"model.layers={{{MAMBA2}, {ATTENTION}, {MLP}}}")


def mamba2() -> "Recipe":
    return shaped('model.pattern="(M)x16"', f"model.layers={{{MAMBA2}}}")


def shaped(*overrides: str) -> "Recipe":
    """A recipe of these benchmarks' width, vocabulary and batch."""
    from launch.recipes import FOLDER
    from train.config import load_recipe

    return load_recipe(FOLDER / "quickstart.toml", [*SHAPE, *overrides])


def train_nemotron_h(quick: bool) -> Iterator[Reading]:
    from launch.bench.training import braid

    return braid(nemotron_h(), QUICK_STEPS if quick else STEPS)


def train_mamba2(quick: bool) -> Iterator[Reading]:
    from launch.bench.training import braid

    return braid(mamba2(), QUICK_STEPS if quick else STEPS)


def peer_nemotron_h(quick: bool) -> Iterator[Reading]:
    from launch.bench.training import hugging_face

    recipe = nemotron_h()
    return hugging_face(recipe, QUICK_STEPS if quick else STEPS, lambda: hf_nemotron_h(recipe), recipe.model)


def peer_mamba2(quick: bool) -> Iterator[Reading]:
    from launch.bench.training import hugging_face

    recipe = mamba2()
    return hugging_face(recipe, QUICK_STEPS if quick else STEPS, lambda: hf_mamba2(recipe), recipe.model)


def hf_nemotron_h(recipe: "Recipe") -> "nn.Module":
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from model.hf.nemotron_h import configuration

    values = configuration(recipe.model) | {"chunk_size": PEER_CHUNK, "attn_implementation": "sdpa"}
    return _with_our_weights(NemotronHForCausalLM, NemotronHConfig(**values), recipe)


def hf_mamba2(recipe: "Recipe") -> "nn.Module":
    from transformers import Mamba2ForCausalLM

    return _with_our_weights(Mamba2ForCausalLM, hf_mamba2_config(recipe.model, PEER_CHUNK), recipe)


def hf_mamba2_config(model: "ModelConfig", chunk: int) -> Any:
    from transformers import Mamba2Config

    from model.layers.mamba2 import Mamba2Config as OurConfig

    layer = model.layers["M"]
    assert isinstance(layer, OurConfig)
    return Mamba2Config(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=len(model.stacked),
        num_heads=layer.n_heads(model.d_model),
        head_dim=layer.head_dim,
        state_size=layer.d_state,
        n_groups=layer.n_groups,
        conv_kernel=layer.d_conv,
        expand=round(layer.expand),
        chunk_size=chunk,
        layer_norm_epsilon=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
    )


def _with_our_weights(kind: Any, config: Any, recipe: "Recipe") -> "nn.Module":
    """The peer, loaded from the initial weights of our model under its own names."""
    import torch
    from safetensors.torch import save_file

    from model.hf.nemotron_h import tensors
    from model.hybrid import HybridLM, initialise_model

    ours = HybridLM(recipe.model)
    initialise_model(ours, recipe.seed)
    values: dict[str, torch.Tensor] = {}
    for name, parameter in ours.named_parameters():
        logical = parameter.detach()[: ours.table()[name].shape[0]].clone()
        values |= dict(tensors(name, logical, recipe.model))
    with TemporaryDirectory(prefix="braid-bench-") as folder:
        save_file({name: value.contiguous() for name, value in values.items()}, str(Path(folder) / "model.safetensors"))
        config.save_pretrained(folder)
        model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {key: sorted(names) for key, names in report.items() if names and key != "error_msgs"}
    assert not wrong, f"the peer's weights are not ours: {wrong}"
    return model


def derive(ours: Side, peer: Side | None) -> dict[str, Any]:
    from launch.bench.training import utilisation

    return utilisation(ours, peer)


NOTE = (
    "same initial weights, batch and AdamW (fused on the peer's side). The peer's torch path does not keep documents "
    f"apart. It runs in the faster of bf16 autocast and bf16 weights, with scan chunks of {PEER_CHUNK} (its fastest)"
)
ROWS = (
    Row(
        name="train_nemotron_h",
        measures="Training step of M-M-M-*-M-M-M-*- (width 512, 37.1M) on rows of 1,024, optimizer included.",
        ours=train_nemotron_h,
        peer=peer_nemotron_h,
        peer_name="transformers NemotronH",
        needs=("transformers",),
        note=NOTE,
        derive=derive,
    ),
    Row(
        name="train_mamba2",
        measures="Training step of sixteen Mamba-2 layers (width 512, 35.9M) on rows of 1,024, optimizer included.",
        ours=train_mamba2,
        peer=peer_mamba2,
        peer_name="transformers Mamba2",
        needs=("transformers",),
        note=NOTE,
        derive=derive,
    ),
)
