"""One side of a benchmark in a process of its own: `python -m launch.bench.worker MODULE:FUNCTION [quick]`.

Each line on stdin asks for one reading; each answer is one line of JSON on what was stdout. Anything that the side
prints goes to stderr. The end of stdin ends it.
"""

import importlib
import json
import os
import sys
import traceback


def main() -> int:
    reference, *words = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, object]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        module, name = reference.split(":")
        readings = getattr(importlib.import_module(module), name)("quick" in words)
        for _ in sys.stdin:
            reading = next(readings)
            answer({"value": reading.value, "facts": dict(reading.facts)})
        readings.close()
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
