"""How many parameters the models of shipped recipes have elsewhere: papers, model cards, transformers' classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MILLION = 10**6


@dataclass(frozen=True)
class Count:
    """value: parameters, as published. within: half of its last digit; 0 for exact counts. missing: what is counted
    there and does not exist here (padding of the vocabulary). embeddings: whether embedding and head are counted."""

    value: float
    within: float
    source: str
    missing: int = 0
    embeddings: bool = True


def _samba(millions: float, within: float, missing: int = 0) -> Count:
    return Count(millions * MILLION, within * MILLION, "arXiv 2406.07522, Table 12, by its shapes", missing)


def _mamba(millions: float, within: float, d_model: int) -> Count:
    source = "github.com/state-spaces/mamba, README, vocabulary padded from 50277 to 50280"
    return Count(millions * MILLION, within * MILLION, source, missing=3 * d_model)


def _mamba2(millions: float, d_model: int) -> Count:
    source = "github.com/state-spaces/mamba, README, vocabulary padded from 50277 to 50288"
    return Count(millions * MILLION, 0.05 * MILLION, source, missing=11 * d_model)


def _moe_mamba(millions: float) -> Count:
    return Count(millions * MILLION, 0.5 * MILLION, "arXiv 2401.04081, Tables 5 and 6", embeddings=False)


def _transformer(millions: float) -> Count:
    """The papers give no count: within 3% of the size's name."""
    return Count(millions * MILLION, 0.03 * millions * MILLION, "arXiv 2312.00752, Table 12")


PUBLISHED = {
    "samba-421m": _samba(421.8, 0.05),
    "samba-1.3b": _samba(1330, 0.5),
    "samba-1.7b": _samba(1742, 0.5, missing=(50304 - 50295) * 2048),
    "samba-3.8b": _samba(3864, 0.5, missing=(32064 - 32011) * 2816),
    "mamba-130m": _mamba(129.1, 0.05, 768),
    "mamba-370m": _mamba(371.5, 0.05, 1024),
    "mamba-790m": _mamba(793.2, 0.05, 1536),
    "mamba-1.4b": _mamba(1372, 0.5, 2048),
    "mamba-2.8b": _mamba(2768, 0.5, 2560),
    "mamba2-130m": _mamba2(129.0, 768),
    "mamba2-370m": _mamba2(368.3, 1024),
    "mamba2-780m": _mamba2(780.2, 1536),
    "mamba2-1.3b": _mamba2(1343.8, 2048),
    "mamba2-2.7b": _mamba2(2702.6, 2560),
    "mamba2-attention-2.7b": Count(2.7e9, 0.05e9, "arXiv 2405.21060, section 9.2", missing=11 * 2560),
    "mamba2-hybrid-800m": Count(0.907e9, 0.0005e9, "Megatron-LM, examples/mamba, by its shapes"),
    "mamba2-hybrid-8b": Count(8.655e9, 0.0005e9, "arXiv 2406.07887 (8.66B)"),
    "nemotron-h-8b": Count(8.1e9, 0.05e9, "nvidia/Nemotron-H-8B-Base-8K, model card"),
    "transformer-125m": _transformer(125),
    "transformer-350m": _transformer(350),
    "transformer-760m": _transformer(760),
    "transformer-1.3b": _transformer(1300),
    "transformer-2.7b": _transformer(2700),
    "moe-mamba-25m": _moe_mamba(542),
    "moe-mamba-25m-parallel": _moe_mamba(542),
    "moe-mamba-100m": _moe_mamba(2439),
    "mamba-25m": _moe_mamba(27),
    "mamba-100m": _moe_mamba(121),
    "transformer-25m": _moe_mamba(25),
    "transformer-moe-25m": _moe_mamba(545),
    "transformer-moe-100m": _moe_mamba(2454),
    "jamba-52b": Count(51.6e9, 0.05e9, "ai21labs/Jamba-v0.1, model card"),
    "zamba2-2.7b": Count(2.446e9, 0.0005e9, "ours: Zyphra/Zamba2-2.7B without LoRA and the twofold width of attention"),
    "falcon-h1-0.5b": Count(521_411_104, 0, "tiiuae/Falcon-H1-0.5B-Base, model card"),
    "granite-4-h-micro": Count(3_191_396_096, 0, "ibm-granite/granite-4.0-h-micro, model card"),
    "granite-4-h-tiny": Count(6_939_037_248, 0, "ibm-granite/granite-4.0-h-tiny, model card"),
    "quickstart": Count(9.6e6, 0.05e6, "ours: README.md"),
}

ACTIVE = {
    "moe-mamba-25m": _moe_mamba(26),
    "moe-mamba-25m-parallel": _moe_mamba(26),
    "moe-mamba-100m": _moe_mamba(117),
    "transformer-moe-25m": _moe_mamba(25),
    "transformer-moe-100m": _moe_mamba(114),
}
"""Parameters that one token meets: of E experts the k that it goes to."""


def count(name: str, **values: Any) -> int:
    """Parameters of transformers' `NAMEForCausalLM` of this configuration, allocated nowhere; tied ones once."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**values))
    return sum(weight.numel() for weight in model.parameters())


def _mamba_lm(layers: int, width: int) -> int:
    return count("Mamba", vocab_size=50280, num_hidden_layers=layers, hidden_size=width, tie_word_embeddings=True)


def _mamba2_lm(layers: int, width: int) -> int:
    heads = {"num_heads": width // 32, "head_dim": 64, "state_size": 128, "n_groups": 1}
    shape = {"vocab_size": 50288, "num_hidden_layers": layers, "hidden_size": width}
    return count("Mamba2", **shape, **heads, tie_word_embeddings=True)


def _llama(layers: int, width: int, heads: int, hidden: int) -> int:
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return count("Llama", **shape, vocab_size=50277, intermediate_size=hidden, tie_word_embeddings=True)


def _nemotron_h(pattern: str, width: int, heads: int, hidden: int, vocabulary: int) -> int:
    shape = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": width // heads}
    mamba = {"mamba_num_heads": width // 32, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128}
    more = {"vocab_size": vocabulary, "intermediate_size": hidden, "hybrid_override_pattern": pattern}
    return count("NemotronH", **shape, **mamba, **more)


def _granite(width: int, heads: int, kv_heads: int, **mlp: int) -> int:
    layers = ["attention" if index % 10 == 5 else "mamba" for index in range(40)]
    shape = {"vocab_size": 100352, "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    mamba = {"mamba_n_heads": width // 32, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_head": 64}
    more = {"num_hidden_layers": 40, "layer_types": layers, "tie_word_embeddings": True}
    return count("GraniteMoeHybrid", **shape, **mamba, **more, **mlp)


def _mamba2_attention() -> int:
    d, width = 2560, 30 * 128
    attention = d + 3 * width * d + width * d + 3 * width * 4
    return _mamba2_lm(58, d) + 6 * attention


def _zamba2() -> int:
    d, hidden = 2560, 10240
    mamba = {"num_hidden_layers": 54, "layers_block_type": ["linear_attention"] * 54, "n_mamba_heads": 80}
    shared = 4 * d * d + 3 * d * hidden + 2 * d
    return count("Zamba2", vocab_size=32000, hidden_size=d, mamba_d_state=64, **mamba) + 2 * shared


def _falcon_h1() -> int:
    shape = {"vocab_size": 32784, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 36}
    mamba = {"mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_state": 128, "mamba_n_groups": 1}
    return count("FalconH1", **shape, **mamba, num_attention_heads=8, num_key_value_heads=2, head_dim=64)


HYBRID_8B = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
HYBRID_800M = "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-"
NEMOTRON_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"

DEFINED: Mapping[str, Callable[[], int]] = {
    "mamba-130m": lambda: _mamba_lm(24, 768),
    "mamba-370m": lambda: _mamba_lm(48, 1024),
    "mamba-790m": lambda: _mamba_lm(48, 1536),
    "mamba-1.4b": lambda: _mamba_lm(48, 2048),
    "mamba-2.8b": lambda: _mamba_lm(64, 2560),
    "mamba2-130m": lambda: _mamba2_lm(24, 768),
    "mamba2-370m": lambda: _mamba2_lm(48, 1024),
    "mamba2-780m": lambda: _mamba2_lm(48, 1536),
    "mamba2-1.3b": lambda: _mamba2_lm(48, 2048),
    "mamba2-2.7b": lambda: _mamba2_lm(64, 2560),
    "mamba2-attention-2.7b": _mamba2_attention,
    "mamba2-hybrid-800m": lambda: _nemotron_h(HYBRID_800M, 1024, 16, 4096, 256_000),
    "mamba2-hybrid-8b": lambda: _nemotron_h(HYBRID_8B, 4096, 32, 16_384, 256_000),
    "nemotron-h-8b": lambda: _nemotron_h(NEMOTRON_8B, 4096, 32, 21_504, 131_072),
    "transformer-125m": lambda: _llama(12, 768, 12, 2048),
    "transformer-350m": lambda: _llama(24, 1024, 16, 2816),
    "transformer-760m": lambda: _llama(24, 1536, 16, 4096),
    "transformer-1.3b": lambda: _llama(24, 2048, 32, 5504),
    "transformer-2.7b": lambda: _llama(32, 2560, 32, 6912),
    "jamba-52b": lambda: count("Jamba"),
    "zamba2-2.7b": _zamba2,
    "falcon-h1-0.5b": _falcon_h1,
    "granite-4-h-micro": lambda: _granite(2048, 32, 8, shared_intermediate_size=8192, num_local_experts=0),
    "granite-4-h-tiny": lambda: _granite(
        1536, 12, 4, intermediate_size=512, shared_intermediate_size=1024, num_local_experts=64, num_experts_per_tok=6
    ),
}
"""Recipe -> the count of the class that defines the model, of the same configuration; exact but for `missing`."""
