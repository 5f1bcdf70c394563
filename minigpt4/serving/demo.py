"""The program behind demo.py: load the model, then chat on a page or in the terminal."""

import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

from minigpt4 import load_config
from minigpt4.common.config import Config
from minigpt4.serving.arguments import device_of, first_settings, use_context


def demo(args: Namespace) -> int | None:
    """Chat until the user leaves; `args` are those of demo.py. Return the exit code. Raises as `minigpt4.load`."""
    sys.stdout.reconfigure(line_buffering=True)  # the page's address reaches a log file at once
    cfg = Config(args)
    # in the terminal, standard output is only the dialogue
    with redirect_stdout(sys.stderr) if args.cli else nullcontext():
        print("Initializing Chat")
        chat, template = load_config(cfg, device_of(args, cfg))
        use_context(chat, args.max_length)
        print("Initialization Finished", flush=True)
    settings = first_settings(cfg)
    if args.cli:
        from minigpt4.serving.terminal import Terminal

        return Terminal(chat, template, **settings).run()
    with environment_of_gradio(args.server_name, args.share):
        from minigpt4.serving.page import Page  # imports gradio

        Page(chat, template, cfg, settings).launch(args)
    return None


@contextmanager
def environment_of_gradio(server_name: str, share: bool) -> Iterator[None]:
    """Set the environment variables that gradio reads when it is imported. Raises OSError if uploads have no place."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
    # otherwise gradio makes a table of all earlier events at each event
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(2**31)
    # gradio checks that its own page answers, which must not go through a proxy; only --share needs the internet
    known = [os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    own = ["localhost", "127.0.0.1", "::1", server_name.strip("[]")]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [*known, *own]))
    for name in list(os.environ):
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy") and not share:
            del os.environ[name]
    if not share:  # only the servers of a public link are trusted to name the client's address
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    # gradio serves all files in this folder to visitors: so one for this page alone, removed at the end
    where = os.environ.get("GRADIO_TEMP_DIR") or None
    try:
        if where:
            os.makedirs(where, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="minigpt4_uploads_", dir=where)
    except OSError as error:
        advice = "set GRADIO_TEMP_DIR to a folder that can be written to"
        raise OSError(f"no place for the images that visitors upload: {error}; {advice}") from error
    with folder as os.environ["GRADIO_TEMP_DIR"]:
        yield
