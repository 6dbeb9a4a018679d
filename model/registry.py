"""The layer kinds: a tagged union of frozen dataclasses, told apart by their field `kind`.

A new kind is one file in `model/layers/` and one member here.
"""

from typing import get_args

from model.layers.attention import AttentionConfig
from model.layers.mamba import MambaConfig
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig
from model.layers.moe import MoEConfig

LayerConfig = Mamba2Config | MambaConfig | AttentionConfig | MLPConfig | MoEConfig

KINDS: dict[str, type] = {member.kind: member for member in get_args(LayerConfig)}
"""Name of a kind, as a recipe writes it, to its config class."""
