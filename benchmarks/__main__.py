"""python -m benchmarks COMMAND: one sub-command a measurement; each prints a table and can write it as JSON."""

import argparse
import json
import sys
from pathlib import Path

from minigpt4.quickstart.quickstart import require_environment

if __name__ == "__main__" and sys.argv[1:2] == ["train"]:
    require_environment()  # threads and memory as in the trainings of `make quickstart`, for all that is compared

from benchmarks import (
    chat,
    compare,
    convert,
    data,
    embedded,
    faults,
    flops,
    gpu,
    kill,
    limits,
    load,
    memory,
    parity,
    parts,
    skipping,
    startup,
    summary,
    train,
)

COMMANDS = {
    "all": summary,
    "chat": chat,
    "compare": compare,
    "convert": convert,
    "data": data,
    "embedded": embedded,
    "faults": faults,
    "flops": flops,
    "gpu": gpu,
    "kill": kill,
    "limits": limits,
    "llm": parts.LLM,
    "load": load,
    "memory": memory,
    "parity": parity,
    "qformer": parts.QFORMER,
    "skipping": skipping,
    "startup": startup,
    "train": train,
    "vit": parts.VIT,
}  # each has HELP, add_arguments(parser) and run(args) -> dict


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        command.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
        module.add_arguments(command)
    args = parser.parse_args(argv)
    result = COMMANDS[args.command].run(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=4) + "\n", encoding="utf-8")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
