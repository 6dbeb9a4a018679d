"""A trained model from a checkpoint, for evaluation, generation and export."""

import torch

from model.config import ModelConfig
from model.hybrid import HybridLM, Precision
from model.params import local_layout
from model.weights.reader import Checkpoint


def load_model(
    checkpoint: Checkpoint, precision: Precision = Precision(), device: torch.device | str = "cpu"
) -> HybridLM:
    """Builds the model that the checkpoint's manifest describes and reads its weights, hashes checked first.

    Raises CheckpointError when the checkpoint is damaged.
    """
    checkpoint.verify()
    model = HybridLM(ModelConfig.from_dict(checkpoint.extra["model"]), precision, device=device)
    table = model.table()
    for name, parameter in model.named_parameters():
        checkpoint.read_into(parameter, name, "weight", local_layout(table[name]))
    return model.eval()
