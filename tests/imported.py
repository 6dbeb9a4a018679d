"""What ranks of tests import: done once, in the process that they are forked from. Nothing here may start a thread."""

import gc
import os
from importlib import import_module

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from train.engine import import_deepspeed

import_deepspeed(torch.device("cpu"))
for late in ("train.loop", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"):
    import_module(late)  # what a step, torch's optimizers and DeepSpeed's engine would import in every rank
gc.freeze()  # no rank need look through all of that whenever it collects
