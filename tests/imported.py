"""What ranks of tests import: done once, in the process that they are forked from. Nothing here may start a thread."""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401

import train.run  # noqa: F401

gc.freeze()  # no rank need look through all of that whenever it collects
