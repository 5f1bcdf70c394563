"""The program behind minigpt4/serve.py: load the model, and serve the OpenAI API until it is stopped."""

import socket
import sys
from argparse import Namespace

from minigpt4 import load_config
from minigpt4.common.config import Config
from minigpt4.serving.arguments import device_of, first_settings, in_url, use_context
from minigpt4.serving.guard import Hosts

# characters that nobody guesses, if they are random; so a wrong key need not slow anybody down
LONG_KEY = 16
GRACE_S = 5  # seconds to finish answers when the server is stopped


def serve(args: Namespace) -> None:
    """Serve until a signal; `args` are those of minigpt4/serve.py.

    Raises as `minigpt4.load`, and OSError for an address that cannot be used.
    """
    sys.stdout.reconfigure(line_buffering=True)  # the address reaches a log file at once
    cfg, hosts = Config(args), _hosts(args)
    listening = _listen(args.server_name, args.server_port)
    with listening:
        print("Loading the model")
        chat, template = load_config(cfg, device_of(args, cfg))
        use_context(chat, args.max_length)
        import uvicorn  # the server's libraries are only needed from here on

        from minigpt4.serving.openai_app import OpenAI

        name = args.model_name or str(cfg.model_cfg.arch)
        api = OpenAI(
            chat,
            template,
            name,
            hosts,
            api_key=args.api_key,
            defaults=first_settings(cfg),
            is_fetching=args.fetch_images,
            batch_size=args.batch_size,
            most_waiting=args.most_waiting,
        )
        port = listening.getsockname()[1]
        print(f"Serving {name} at http://{in_url(args.server_name)}:{port}/v1", flush=True)
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


def _hosts(args: Namespace) -> Hosts:
    """Return the names of the server; warn if the network can reach it and no long key protects it."""
    hosts = Hosts(args.server_name, advice="start it with --url ITS.NAME, which may be repeated")
    for url in args.url:
        hosts.add(url)
    if (hosts.public or not hosts.is_local) and len(args.api_key or "") < LONG_KEY:
        advice = f"others can use it: set an API key of {LONG_KEY} random characters or more"
        print(f"The network can reach this server, so {advice}", file=sys.stderr)
    return hosts


def _listen(name: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError that names the address."""
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    try:
        return socket.create_server((name, port), family=family, backlog=256)
    except OSError as error:
        raise OSError(
            f"--server-name {name} --server-port {port}: {error}; choose others"
        ) from error
