"""Runs the script named by the first argument: ``python3 scripts/support NAME ARGUMENT…``."""

import importlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

SCRIPTS = {
    "setup": "setup",
    "guests": "guests",
    "nested": "nested",
    "demo": "demo",
    "test": "suite",
    "bench": "bench",
    "fuzz": "fuzz",
}


def main() -> int:
    from support.host import ScriptError

    name = sys.argv.pop(1)
    sys.argv[0] = f"scripts/{name}"
    try:
        return int(importlib.import_module(f"support.{SCRIPTS[name]}").main(sys.argv[1:]))
    except ScriptError as error:
        print(f"scripts/{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
