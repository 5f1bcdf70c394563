"""Chat about images, on a page in the browser, which only this machine can open by default, or in the terminal.

python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --gpu-id 0
python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --cli
python demo.py --checkpoint minigpt4/quickstart/checkpoint
"""

import argparse
import sys

from minigpt4.common.checkpoint_folder import with_checkpoint
from minigpt4.common.cli import run_program
from minigpt4.serving.arguments import add_model_arguments, host_name
from minigpt4.serving.demo import demo


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of `demo`; --checkpoint becomes one of the --options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--cli", action="store_true", help="chat in the terminal instead of the browser"
    )
    page = parser.add_argument_group("the page")
    page.add_argument(
        "--server-name",
        type=host_name,
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 opens the page to the network (default: %(default)s)",
    )
    page.add_argument("--server-port", type=int, help="default: the first free port from 7860 on")
    page.add_argument("--auth", metavar="USER:PASS", help="require this name and password")
    page.add_argument(
        "--share",
        action="store_true",
        help="create a public link through gradio's servers; needs --auth",
    )
    args = parser.parse_args(argv)
    if args.auth is not None and not all(args.auth.partition(":")):
        parser.error("--auth: expected USER:PASS")
    if args.share and not args.auth:
        parser.error("--share opens this program to the whole internet: add --auth USER:PASS")
    return with_checkpoint(args, parser)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the program with this command line."""
    return run_program(demo, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
