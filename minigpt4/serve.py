"""Serve a model to programs through the OpenAI API: /v1/chat/completions, /v1/models, /health.

python -m minigpt4.serve --cfg-path eval_configs/minigpt4_eval.yaml --checkpoint checkpoint_4.pth
python -m minigpt4.serve --checkpoint minigpt4/quickstart/checkpoint
MINIGPT4_API_KEY=... python -m minigpt4.serve --cfg-path eval_configs/minigpt4_eval.yaml --server-name 0.0.0.0
"""

import argparse
import os
import sys

from minigpt4.common.checkpoint_folder import with_checkpoint
from minigpt4.common.cli import run_program
from minigpt4.serving.arguments import add_model_arguments, host_name
from minigpt4.serving.serve import serve

# an environment variable, since other users of the machine can see command lines
API_KEY = "MINIGPT4_API_KEY"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of `serve`; --checkpoint becomes one of the --options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add_model_arguments(parser)
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--server-name",
        type=host_name,
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 opens the server to the network (default: %(default)s)",
    )
    server.add_argument(
        "--server-port", type=int, default=8000, help="0: any free port (default: %(default)s)"
    )
    server.add_argument(
        "--url",
        action="append",
        default=[],
        help="another name or public URL of the server: of a proxy in front, of a container's host; may be repeated",
    )
    server.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"API key that clients must send (default: ${API_KEY}, else none)",
    )
    server.add_argument(
        "--model-name",
        metavar="NAME",
        help="name of the model in requests (default: model.arch)",
    )
    server.add_argument(
        "--fetch-images",
        action="store_true",
        help="also fetch images from http(s) addresses of the public internet",
    )
    server.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="most requests answered together, if their settings are equal (default: %(default)s)",
    )
    server.add_argument(
        "--most-waiting",
        type=int,
        default=64,
        help="most requests behind the first, those of its batch included; "
        "further ones get HTTP status 429 (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.most_waiting < 1:
        parser.error("--batch-size, --most-waiting: expected at least 1")
    if not 0 <= args.server_port < 2**16:
        parser.error(f"--server-port: {args.server_port}; expected 0 to 65535")
    args.api_key = _api_key(args, parser)
    return with_checkpoint(args, parser)


def _api_key(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str | None:
    """Return the key of the command line, else of the environment, without the end of its line; None if there is none."""
    key = os.environ.get(API_KEY) if args.api_key is None else args.api_key
    if key is not None and not key.strip():
        parser.error(
            f"--api-key, ${API_KEY}: empty; expected a key, or neither for a server without"
        )
    return key and key.strip()


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the program with this command line."""
    return run_program(serve, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
