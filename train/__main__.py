"""One rank of a run: `python -m train RECIPE [section.key=value ...]`, alone or under torchrun or srun."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from train.mistakes import describe
from train.rank import die_with_launcher, explained, final, report
from train.stop import EXIT_STALLED, EXIT_UNHEALTHY, EXIT_USER_ERROR

EXIT_FAULT = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains or resumes; returns the exit code, as `train.stop` names them."""
    die_with_launcher()
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    chosen = parser.parse_args(arguments)
    from train.health import TrainingHealthError
    from train.watch import RankLost

    try:
        from train.config import load_recipe
        from train.loop import train

        return final(train(load_recipe(chosen.recipe, chosen.overrides)))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except TrainingHealthError as error:
        report(str(error))
        return final(EXIT_UNHEALTHY)
    except RankLost as error:
        report(str(error), survivor=True)
        return EXIT_STALLED
    except Exception as error:
        line = describe(error)
        if line is None and explained():
            return EXIT_FAULT
        if line is None:
            raise
        report(line)
        return final(EXIT_USER_ERROR)


def leave(code: int) -> None:
    """Ends this process. After an error its process group is still open (closing it would wait for the others), and
    torch's threads may abort a process that is taken down around them: then it ends without being taken down."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
