"""The command line options that programs of the quickstart share; light to import, as --help has to be."""

import argparse


def add_cache_root(parser: argparse.ArgumentParser) -> None:
    """Add --cache-root: where the drawn data and the LLM are kept."""
    parser.add_argument(
        "--cache-root", help="default: env.cache_root of minigpt4/configs/default.yaml"
    )


def add_config_options(parser: argparse.ArgumentParser, used_by: str) -> None:
    """Add --cache-root, and --options: more options of the configuration for what `used_by` names."""
    add_cache_root(parser)
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"more options for {used_by}",
    )


def cache_root_option(args: argparse.Namespace) -> list[str]:
    """Return --cache-root as an option of the configuration; an empty list if it is not given."""
    return [f"env.cache_root={args.cache_root}"] if args.cache_root else []
