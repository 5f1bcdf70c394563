"""Command line arguments that demo.py and minigpt4.serve share: the model and its device."""

import argparse
import sys
from typing import TYPE_CHECKING

from minigpt4.common.checkpoint_folder import CHECKPOINT_HELP
from minigpt4.common.config import PACKAGE_DIR, Config, add_config_arguments
from minigpt4.common.utils import expand_path

if TYPE_CHECKING:  # torch takes seconds to import
    from minigpt4.conversation.chat import Chat

MAX_LENGTH = (
    8192  # the default of --max-length: with a 7B LLM its keys and values take 4 GB a dialogue
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --cfg-path, --options, --checkpoint, --max-length, --device and --gpu-id."""
    add_config_arguments(parser, required=False)
    parser.add_argument("--checkpoint", metavar="PATH", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--max-length",
        type=_num_tokens,
        metavar="TOKENS",
        help=f"longest dialogue (default: what the LLM reads, but at most {MAX_LENGTH}, to save memory)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: run.device)")
    where.add_argument(
        "--gpu-id",
        type=int,
        metavar="N",
        help="like --device cuda:N, but the CPU if there is no CUDA",
    )


def host_name(text: str) -> str:
    """Return the value of --server-name, an IPv6 address without brackets.

    Raises ArgumentTypeError for an empty one, by which a socket would listen on all addresses.
    """
    name = text.strip().strip("[]")
    if not name:
        raise argparse.ArgumentTypeError("empty; expected a name or an address of this machine")
    return name


def in_url(name: str) -> str:
    """Return a host name or address as URLs hold it: an IPv6 address in brackets."""
    return f"[{name}]" if ":" in name else name


def _num_tokens(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of tokens, at least 2")
    return int(text)


def use_context(chat: "Chat", max_length: int | None) -> None:
    """Let dialogues with `chat` have `max_length` tokens, by default as many as its LLM reads, but at most MAX_LENGTH."""
    chat.max_length = max_length or min(chat.max_positions or MAX_LENGTH, MAX_LENGTH)


def device_of(args: argparse.Namespace, cfg: Config) -> str | None:
    """Return the device; None stands for `run.device`."""
    if args.gpu_id is None:
        return args.device
    import torch

    if not torch.cuda.is_available():
        print(
            f"--gpu-id {args.gpu_id}: torch sees no CUDA GPU on this machine; the CPU is used",
            file=sys.stderr,
        )
        return "cpu"
    return f"cuda:{args.gpu_id}"


def first_settings(cfg: Config) -> dict[str, float]:
    """Return the initial settings of answers.

    A model with the small vision weights that the package ships starts greedy: sampling makes its answers no better.
    """
    is_small = expand_path(cfg.model_cfg.vit_ckpt).resolve().is_relative_to(PACKAGE_DIR)
    return {"temperature": 0.0 if is_small else 1.0}
