"""python -m benchmarks COMMAND: each command is a measurement that prints a table and can write it as JSON."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from minigpt4.quickstart.quickstart import require_environment

if __name__ == "__main__" and sys.argv[1:2] == ["train"]:
    # thread and memory settings as in the trainings of `make quickstart`, for all ways that are compared
    require_environment()

from benchmarks import harness

# {command: module of this package, or an object in one, with HELP, OPTIONS and run(args) -> {"rows": [..], ..}}
COMMANDS = {
    "all": "suites.ALL",
    "chat": "chat",
    "compare": "harness.COMPARE",
    "data": "data",
    "flops": "counted.FLOPS",
    "gpu": "gpu",
    "limits": "counted.LIMITS",
    "llm": "train.LLM",
    "load": "load",
    "memory": "counted.MEMORY",
    "parity": "parity",
    "qformer": "train.QFORMER",
    "serve": "serve",
    "startup": "startup",
    "train": "train",
    "vit": "train.VIT",
}
MOVED = {
    "embedded": "python -m minigpt4.quickstart.seeds",
    "skipping": "python -m pytest tests/survival/test_skipping.py -m survival -s",
    "faults": "python -m pytest tests/survival -m survival --fault-table docs/reliability.md",
    "kill": "python -m pytest tests/survival/test_kill.py -m survival",
    "convert": "python -m pytest tests/datasets/test_convert.py (its figures: docs/performance.md)",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return 0 if every gate holds, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in MOVED:
        parser.error(f"{words[0]} has moved: {MOVED[words[0]]}")
    # only the command that is asked for is imported: the others may need packages that are not installed
    names = [words[0]] if words and words[0] in COMMANDS else list(COMMANDS)
    for name in names:
        command = found(name)
        sub = commands.add_parser(name, help=command.HELP, description=command.HELP)
        sub.add_argument(
            "--json",
            metavar="PATH",
            help="also write the figures to this file (-: as the last line)",
        )
        for flag, arguments in command.OPTIONS.items():
            sub.add_argument(*flag.split(), **arguments)  # current and former names of the flag
        sub.set_defaults(run=command.run)
    args = parser.parse_args(words)
    result = measured(args)
    if args.json == "-":
        print(json.dumps(result), flush=True)
    elif args.json:
        Path(args.json).write_text(json.dumps(result, indent=4) + "\n", encoding="utf-8")
    return 0 if result["passed"] else 1


def found(name: str) -> Any:
    """Import and return the command `name`."""
    module, _, attribute = COMMANDS[name].partition(".")
    command = importlib.import_module(f"benchmarks.{module}")
    return getattr(command, attribute) if attribute else command


def measured(args: argparse.Namespace) -> dict:
    """Run the command of `args` and print its table; return its result, "passed", and the machine and versions."""
    try:
        result = {"rows": [], "passed": True} | args.run(args)
    except harness.NotEqual as error:
        print(f"FAIL: {error}, no speed is shown")
        return {"rows": [], "passed": False, "failure": str(error), **harness.description()}
    if result["rows"]:
        harness.print_table(result["rows"])
        result["passed"] &= all(row["passed"] for row in result["rows"])
        print("PASS" if result["passed"] else "FAIL")
    return {**result, **harness.description()}


if __name__ == "__main__":
    sys.exit(main())
