"""Tasks of our own for lm-eval: made by `probes.py` from fixed seeds, described by the YAML files beside it."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""For lm-eval's `include_path`."""

DEFAULT = "braid_probes"
"""The group of all of them."""
