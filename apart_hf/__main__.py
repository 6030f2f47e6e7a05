"""The commands behind one name: python -m apart_hf train | validate | push_to_hub | reproduce | analyse"""

from __future__ import annotations

import importlib
import sys

COMMANDS = ("train", "validate", "push_to_hub", "reproduce", "analyse")


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an unknown one ends in one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        print(f"apart_hf: error: {name!r} is no command; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"apart_hf.cli.{name}").main(arguments[1:])


if __name__ == "__main__":
    main()
