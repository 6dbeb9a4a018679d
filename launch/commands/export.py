"""Publishes the newest checkpoint of RUN as a Hugging Face folder.

DIR loads with AutoModelForCausalLM and AutoTokenizer where only torch and transformers are installed. A braid of
Mamba-2, full attention without positions and squared-ReLU MLPs becomes transformers' own NemotronH; any other carries
its modeling code (trust_remote_code=True). What was written is loaded again and compared before DIR appears.
"""

import argparse
from pathlib import Path

from launch.commands.arguments import find_run
from launch.optional import need


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name, or one checkpoint's folder")
    parser.add_argument("folder", metavar="DIR", help="the folder to make")
    parser.add_argument("--format", choices=("auto", "braid", "nemotron_h"), default="auto", help="default: auto")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrices (default: float32)"
    )
    parser.add_argument(
        "--shard-gib", type=float, default=5.0, metavar="X", help="largest weight file, in GiB (default: 5)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that was exported before")


def run(arguments: argparse.Namespace) -> int:
    if arguments.shard_gib <= 0:
        raise ValueError(f"--shard-gib: got {arguments.shard_gib}, wants a positive size in GiB")
    folder = find_run(arguments.run)
    need("transformers", "export")
    import torch

    from launch.export.folder import export

    done = export(
        folder,
        Path(arguments.folder),
        format=arguments.format,
        dtype=getattr(torch, arguments.dtype),
        shard_gib=arguments.shard_gib,
        overwrite=arguments.overwrite,
    )
    kind = "transformers' own NemotronH" if done.format == "nemotron_h" else "with its own modeling code"
    print(f"{done.folder}: {done.bytes / 2**20:,.1f} MiB, {kind}")
    if done.why is not None and arguments.format == "auto":
        print(f"not NemotronH: {done.why}")
    print(f"logits within {done.parity.difference:.1e} of the run's, greedy decoding with the cache alike")
    return 0
