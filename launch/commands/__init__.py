"""One module per `braid` command: `configure(parser)` declares its arguments, `run(arguments)` returns the exit code.

Heavy imports belong inside `run`, so that `--help` answers at once.
"""
