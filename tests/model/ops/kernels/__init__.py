"""Checks of Triton kernels, ours and mamba-ssm's. `tests/model/ops/test_kernels.py` runs each file in a process of its
own: on a CPU through Triton's interpreter (which is decided at Triton's import), on a CUDA device as compiled.

The packages come from a folder beside the virtual environment's own (`make peers`; `PEERS` below), which only these
processes see: where mamba-ssm can be imported without a GPU, transformers' Mamba classes take its CUDA path and fail,
and a CUDA machine's torch brings a Triton that must not be replaced.
"""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
