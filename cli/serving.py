"""`engram serve`: serve a model by transformers' own server."""

import argparse
from typing import Any


def add_commands(commands: Any) -> None:
    """Add the commands of this module to an argparse subparsers object."""
    serve = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server for one model",
        description="Serve a model by transformers' own server, until it is interrupted: chat completions, completions, responses, "
        "models, health. Any other option of `transformers serve` is passed to it; `transformers serve --help` lists them.",
        allow_abbrev=False,
    )
    serve.add_argument("model", metavar="MODEL", help="a saved model, or a Hub id; the name that requests give")
    serve.add_argument("--host", default="localhost", help="address to listen on (default: localhost)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    serve.add_argument(
        "--residency",
        choices=("auto", "resident", "mapped", "pinned"),
        default="auto",
        help="where the memory's tables live (default: auto)",
    )
    serve.add_argument(
        "--continuous-batching", action="store_true", help="run requests together, not one after another"
    )
    serve.add_argument("--trust-remote-code", action="store_true", help="run code from the model's folder")
    serve.set_defaults(run=run_serve, takes_others=True)


def run_serve(options: argparse.Namespace) -> None:
    """Serve `options.model`; `options.others` are arguments of transformers' server."""
    from engram_hf.serving.server import serve

    serve(
        options.model,
        host=options.host,
        port=options.port,
        residency=options.residency,
        continuous_batching=options.continuous_batching,
        trust_remote_code=options.trust_remote_code,
        options=options.others,
    )
