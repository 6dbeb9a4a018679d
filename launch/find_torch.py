"""Exit code 0 when this Python already has a torch with CUDA that Braid runs on, 1 otherwise; for `make setup`."""

import sys

OLDEST = (2, 11)


def usable() -> bool:
    """Whether torch is importable, new enough and sees a CUDA device."""
    try:
        import torch
    except ImportError:
        return False
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= OLDEST and torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(0 if usable() else 1)
