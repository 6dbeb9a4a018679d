"""A trained model from a checkpoint folder, for evaluation, generation and export."""

from pathlib import Path

import torch

from model.config import ModelConfig
from model.hybrid import HybridLM, Precision
from model.params import local_layout
from model.weights.reader import Checkpoint


def load_model(
    checkpoint: Checkpoint | Path, precision: Precision = Precision(), device: torch.device | str = "cpu"
) -> HybridLM:
    """Builds the model that the checkpoint's manifest describes and reads its weights, hashes checked first.

    Raises CheckpointError when the checkpoint is damaged.
    """
    if isinstance(checkpoint, Path):
        checkpoint = Checkpoint(checkpoint)
    checkpoint.verify()
    model = HybridLM(ModelConfig.from_dict(checkpoint.extra["model"]), precision, device=device)
    table = model.table()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = torch.zeros(parameter.shape, dtype=parameter.dtype)
            checkpoint.read_into(local, name, "weight", local_layout(table[name]))
            parameter.copy_(local)
    return model.eval()
