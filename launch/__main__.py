"""`python -m launch`: the same as `braid`, and how the ranks of a command start."""

import os
import sys

from launch.cli import main

if __name__ == "__main__":
    code = main()
    if code and "RANK" in os.environ:
        # After an error other ranks may still be connected, and ending the interpreter then aborts with another code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
