"""What demo.py does with its arguments: load the model, chat on a page or in the terminal."""

import os
import sys
from argparse import Namespace
from contextlib import nullcontext, redirect_stdout

from minigpt4 import load_config
from minigpt4.common.config import PACKAGE_DIR, Config
from minigpt4.common.utils import expand_path


def demo(args: Namespace) -> int | None:
    """Chat until the user leaves; `args` are those of demo.py. Return the exit code. Raises as `minigpt4.load`."""
    sys.stdout.reconfigure(line_buffering=True)  # the page's address reaches a log at once
    # a terminal's standard output is the dialogue alone
    with redirect_stdout(sys.stderr) if args.cli else nullcontext():
        print("Initializing Chat")
        cfg = Config(args)
        chat, template = load_config(cfg, _device(args, cfg))
        print("Initialization Finished", flush=True)
    # the small vision weights that the package ships answer no better for being sampled: greedy
    is_small = expand_path(cfg.model_cfg.vit_ckpt).resolve().is_relative_to(PACKAGE_DIR)
    settings = {"temperature": 0.0 if is_small else 1.0}
    # libraries of the page are loaded only where one is shown
    if args.cli:
        from minigpt4.serving.terminal import Terminal

        return Terminal(chat, template, **settings).run()
    else:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
        from minigpt4.serving.page import Page

        Page(chat, template, cfg, settings).launch(args)


def _device(args: Namespace, cfg: Config) -> str | None:
    """Return the name of the device, None for `run.device`; an 8-bit LLM goes to the same GPU."""
    if args.gpu_id is None:
        return args.device
    import torch

    if not torch.cuda.is_available():
        print(f"--gpu-id {args.gpu_id}: torch sees no CUDA GPU on this machine; the CPU is used", file=sys.stderr)
        return "cpu"
    cfg.model_cfg.device_8bit = args.gpu_id
    return f"cuda:{args.gpu_id}"
