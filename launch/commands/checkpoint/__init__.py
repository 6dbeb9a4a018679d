"""Looks after the checkpoints of a run."""

COMMANDS = {
    "list": "what a run has, and whether it can be trusted",
    "show": "what is in one checkpoint",
    "prune": "delete those that a policy lets go",
    "average": "the mean of several as a new one",
}
