"""The program behind minigpt4/serve.py: load the model, and serve the OpenAI API until it is stopped."""

import os
import socket
import sys
from argparse import Namespace

from minigpt4 import load_config
from minigpt4.common.config import Config
from minigpt4.serving.arguments import device_of, first_settings, use_context

# an environment variable, since other users of the machine can see command lines
API_KEY = "MINIGPT4_API_KEY"
GRACE_S = 5  # seconds to finish answers when the server is stopped


def serve(args: Namespace) -> None:
    """Serve until a signal; `args` are those of minigpt4/serve.py.

    Raises as `minigpt4.load`, and OSError for an address that cannot be used.
    """
    sys.stdout.reconfigure(line_buffering=True)  # the address reaches a log file at once
    cfg = Config(args)
    listening = _listen(args.server_name.strip("[]"), args.server_port)
    with listening:
        print("Loading the model")
        chat, template = load_config(cfg, device_of(args, cfg))
        use_context(chat, args.max_length)
        import uvicorn  # the server's libraries are only needed from here on

        from minigpt4.serving.guard import Hosts
        from minigpt4.serving.openai_app import OpenAI

        hosts, name = Hosts(args.server_name), args.model_name or str(cfg.model_cfg.arch)
        hosts.add(args.url)
        api = OpenAI(
            chat,
            template,
            name,
            hosts,
            api_key=args.api_key or os.environ.get(API_KEY),
            defaults=first_settings(cfg),
            is_fetching=args.fetch_images,
            batch_size=args.batch_size,
            most_waiting=args.most_waiting,
        )
        port = listening.getsockname()[1]
        print(f"Serving {name} at http://{args.server_name}:{port}/v1", flush=True)
        config = uvicorn.Config(
            api.asgi,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=GRACE_S,
        )
        uvicorn.Server(config).run(sockets=[listening])


def _listen(name: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError that names the address."""
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    try:
        return socket.create_server((name, port), family=family, backlog=256)
    except OSError as error:
        raise OSError(
            f"--server-name {name} --server-port {port}: {error}; choose others"
        ) from error
