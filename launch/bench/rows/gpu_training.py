"""Training steps at 1.3B on a GPU, in bfloat16: beside mamba-ssm's own model, Hugging Face's classes and a plain loop.

`mamba2`: the recipe mamba2-1.3b. `nemotron_h`: five times M-M-M-*-, width 2,048, without positions. A step is 8 rows of
4,096 tokens, in micro-batches of 4 (of 2 where the GPU has less than 100 GiB), or 2 of 32,768 with blocks recomputed on
both sides. All scan in chunks of 256, which is mamba-ssm's choice.
"""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from launch.bench.row import Reading, Row, Side

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.config import Recipe

STEPS, QUICK_STEPS = 2, 1
COMMON = (
    "parallel.zero_stage=1",
    "schedule.warmup_tokens=none",
    "schedule.warmup_fraction=0.0",
    "optimizer.learning_rate=1e-5",  # without warm-up 1e-4 throws the loss up in the third step
)
LENGTHS = {
    4096: ("training.sequence_length=4096", "training.rows_per_step=8"),
    32768: (
        "training.sequence_length=32768",
        "training.rows_per_step=2",
        "training.micro_batch_rows=2",
        "training.checkpoint_blocks=true",
    ),
}
ROOMY_GIB = 100
MAMBA2 = ('model.layers={M={kind="mamba2", head_dim=64, d_state=128, chunk=256}}',)
HYBRID = (
    'model.pattern="(M-M-M-*-)x5"',
    'model.layers={M={kind="mamba2", head_dim=64, d_state=128, chunk=256}, "*"={kind="attention", n_heads=16, '
    'n_kv_heads=8, rope_theta="none"}, "-"={kind="mlp", d_hidden=8192, activation="relu2", gated=false}}',
    "model.tie_embeddings=false",
)


def mamba2(length: int = 4096) -> "Recipe":
    return _recipe(length, *MAMBA2)


def nemotron_h(length: int = 4096) -> "Recipe":
    return _recipe(length, *HYBRID)


def _recipe(length: int, *overrides: str) -> "Recipe":
    import torch

    from launch.recipes import FOLDER
    from train.config import load_recipe

    roomy = torch.cuda.is_available() and torch.cuda.mem_get_info()[1] > ROOMY_GIB * 2**30
    rows = f"training.micro_batch_rows={4 if roomy else 2}"
    return load_recipe(FOLDER / "mamba2-1.3b.toml", [*COMMON, rows, *LENGTHS[length], *overrides])


# ---- ours ----


def ours_mamba2(quick: bool) -> Iterator[Reading]:
    return _ours(mamba2(), quick)


def ours_mamba2_32k(quick: bool) -> Iterator[Reading]:
    return _ours(mamba2(32768), quick)


def ours_nemotron_h(quick: bool) -> Iterator[Reading]:
    return _ours(nemotron_h(), quick)


def _ours(recipe: "Recipe", quick: bool) -> Iterator[Reading]:
    from launch.bench.training import braid

    return braid(recipe, QUICK_STEPS if quick else STEPS)


# ---- the others ----


def plain(quick: bool) -> Iterator[Reading]:
    from launch.bench.training import plain_loop

    return plain_loop(mamba2(), QUICK_STEPS if quick else STEPS)


def mamba_ssm(quick: bool) -> Iterator[Reading]:
    return _peer(mamba2(), "mamba_ssm", quick)


def mamba_ssm_32k(quick: bool) -> Iterator[Reading]:
    return _peer(mamba2(32768), "mamba_ssm", quick)


def hf_mamba2(quick: bool) -> Iterator[Reading]:
    return _peer(mamba2(), "hf_mamba2", quick)


def hf_nemotron_h(quick: bool) -> Iterator[Reading]:
    return _peer(nemotron_h(), "hf_nemotron_h", quick)


def _peer(recipe: "Recipe", builder: str, quick: bool) -> Iterator[Reading]:
    from launch.bench.training import hugging_face

    return hugging_face(recipe, QUICK_STEPS if quick else STEPS, lambda: BUILDERS[builder](recipe), recipe.model)


def build_mamba_ssm(recipe: "Recipe") -> "nn.Module":
    """Their language model, fused as they ship it, in float32 on the GPU, with their own initial values."""
    import torch.nn.functional as F
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    layer: Any = recipe.model.layers["M"]
    model = MambaLMHeadModel(
        MambaConfig(
            d_model=recipe.model.d_model,
            n_layer=len(recipe.model.stacked),
            vocab_size=recipe.model.vocab_size,
            ssm_cfg={
                "layer": "Mamba2",
                "d_state": layer.d_state,
                "chunk_size": layer.chunk,
                "headdim": layer.head_dim,
                "ngroups": layer.n_groups,
            },
            tie_embeddings=recipe.model.tie_embeddings,
        ),
        device="cuda",
    )
    if recipe.training.checkpoint_blocks:
        for block in model.backbone.layers:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: "Tensor", labels: "Tensor", use_cache: bool) -> SimpleNamespace:
            logits = self.model(input_ids).logits[:, :-1]
            return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))

    return WithLoss()


def build_hf_mamba2(recipe: "Recipe") -> "nn.Module":
    from transformers import Mamba2ForCausalLM

    from launch.bench.rows.train_hybrids import hf_mamba2_config

    layer: Any = recipe.model.layers["M"]
    return _on_the_gpu(lambda: Mamba2ForCausalLM(hf_mamba2_config(recipe.model, layer.chunk)))


def build_hf_nemotron_h(recipe: "Recipe") -> "nn.Module":
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from model.hf.nemotron_h import configuration

    config = NemotronHConfig(**configuration(recipe.model) | {"attn_implementation": "sdpa"})
    return _on_the_gpu(lambda: NemotronHForCausalLM(config))


def _on_the_gpu(build: Any) -> "nn.Module":
    import torch

    with torch.device("cuda"):
        return build().float()


BUILDERS = {"mamba_ssm": build_mamba_ssm, "hf_mamba2": build_hf_mamba2, "hf_nemotron_h": build_hf_nemotron_h}


def derive(ours: Side, peer: Side | None) -> dict[str, Any]:
    from launch.bench.training import utilisation

    return utilisation(ours, peer)


MAMBA_SSM = ("mamba_ssm", "causal_conv1d", "transformers")
NOTE = (
    "the same shape, tokens and fused AdamW, each with its own initial values; ours in float32 weights and gradients "
    "with documents kept apart, the peer in the faster of bf16 autocast and bf16 weights, without documents"
)


SHAPE = "Training step of mamba2-1.3b"
HF_NOTE = f"{NOTE}; the peer takes mamba-ssm's kernels where they are installed"
ROWS = (
    Row(
        name="gpu_train_mamba2",
        measures=f"{SHAPE}, 8 rows of 4,096, optimizer included.",
        ours=ours_mamba2,
        peer=mamba_ssm,
        peer_name="mamba-ssm MambaLMHeadModel",
        needs=MAMBA_SSM,
        note=NOTE,
        derive=derive,
        cuda=True,
    ),
    Row(
        name="gpu_train_mamba2_32k",
        measures=f"{SHAPE}, 2 rows of 32,768, blocks recomputed, optimizer included.",
        ours=ours_mamba2_32k,
        peer=mamba_ssm_32k,
        peer_name="mamba-ssm MambaLMHeadModel",
        needs=MAMBA_SSM,
        note=f"{NOTE}; both recompute blocks",
        derive=derive,
        cuda=True,
    ),
    Row(
        name="gpu_train_mamba2_hf",
        measures=f"{SHAPE}, 8 rows of 4,096, optimizer included.",
        ours=ours_mamba2,
        peer=hf_mamba2,
        peer_name="transformers Mamba2",
        needs=("transformers",),
        note=HF_NOTE,
        derive=derive,
        cuda=True,
    ),
    Row(
        name="gpu_train_nemotron_h",
        measures="Training step of (M-M-M-*-)x5 (width 2,048, 1.4B), 8 rows of 4,096, optimizer included.",
        ours=ours_nemotron_h,
        peer=hf_nemotron_h,
        peer_name="transformers NemotronH",
        needs=("transformers",),
        note=HF_NOTE,
        derive=derive,
        cuda=True,
    ),
    Row(
        name="gpu_engine",
        measures=f"{SHAPE} through the engine, 8 rows of 4,096, beside a loop of plain torch.",
        ours=ours_mamba2,
        peer=plain,
        peer_name="the same model in plain torch",
        note="a ratio above 0.97: the engine and the loop cost less than 3%",
        derive=derive,
        cuda=True,
    ),
)
