"""lm-eval's own command line, with the model `braid` and the tasks of eval/tasks/ known to it.

    braid lm-eval --model braid --model_args run=runs/quickstart --tasks braid_probes --batch_size 16

model_args: run (a run folder or its name), checkpoint, dtype (float32, bfloat16), max_length.
"""

import sys
from collections.abc import Sequence

from launch.optional import need


def forward(words: Sequence[str]) -> int:
    """Runs `lm-eval WORDS`."""
    need("lm_eval", "eval")
    import lm_eval.tasks
    import torch.distributed as dist
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.api.registry import register_model
    from lm_eval.utils import setup_logging

    from eval.benchmarks import Probes, is_unreachable
    from launch.evaluation import RunLM

    register_model("braid")(RunLM)
    lm_eval.tasks.TaskManager = Probes  # every command of lm-eval takes it from here when it runs
    sys.argv = ["lm-eval", *words]
    setup_logging()
    try:
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
    except Exception as error:
        if not is_unreachable(error):
            raise
        raise ValueError(f"the data of a task is not here ({error}); wants a network, or HF_HOME with it") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
