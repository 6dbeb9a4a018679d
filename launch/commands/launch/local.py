"""Trains RECIPE on N ranks of this machine under torchrun's agent, or resumes it: the same as `braid train --nproc N`.

SIGTERM, SIGUSR1, SIGHUP or Ctrl-C save and exit with 75; the same command resumes.
"""

from launch.commands.train import configure, run

__all__ = ["configure", "run"]
