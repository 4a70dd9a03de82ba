"""``jax-mono serve``: an OpenAI-compatible API and a page to try the model on."""

from __future__ import annotations

import argparse
import ipaddress
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_mono import settings
from jax_mono.cli import options
from jax_mono.cli.console import note

if TYPE_CHECKING:
    from jax_mono.decoder import Decoder
    from jax_mono.serve.service import Service

_DESCRIPTION = """\
Serves a model: a page to try it on at /, and OpenAI's API at /v1.

  jax-mono serve                                  mini-coder on http://127.0.0.1:8000: goes on with code
  jax-mono serve -c smollm2-135m-instruct         a model that answers
  jax-mono serve -c DIR --port 9000 --context 8192
  jax-mono serve --host 0.0.0.0 --api-key SECRET  for others too; they need the key

  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
       -d '{"prompt": "def fibonacci(n):", "max_tokens": 64, "temperature": 0}'

One request is decoded at a time; others wait in a bounded line and take turns. Ctrl-C ends the server.
"""

_CONTEXT = 4096


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "serve", run, "serve a page and an OpenAI-compatible API", _DESCRIPTION)
    model = parser.add_argument_group("model")
    options.add_checkpoint_options(model)
    options.add_dtype_option(model)
    options.add_shape_options(model)
    model.add_argument(
        "--context",
        metavar="N",
        type=options.count,
        help=f"tokens of prompt and answer together; the model's longest, at most {_CONTEXT}, if absent",
    )
    model.add_argument("--name", metavar="NAME", help="what clients call the model; the checkpoint's name if absent")
    network = parser.add_argument_group("network")
    network.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="where to listen")
    network.add_argument("--port", metavar="N", type=options.natural, default=8000, help="0 takes a free one")
    network.add_argument("--api-key", metavar="KEY", help="what clients must send; JAX_MONO_API_KEY if absent")
    network.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="another name of this machine that clients may use; only needed while listening on this machine alone",
    )
    network.add_argument("--access-log", action="store_true", help="one line per request on stderr")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--queue", metavar="N", type=options.count, default=64, help="requests that may wait")
    limits.add_argument(
        "--deadline", metavar="SECONDS", type=options.seconds, default=600.0, help="from a request to its answer's end"
    )
    limits.add_argument(
        "--max-body", metavar="BYTES", type=options.count, default=2 << 20, help="size of a request at most"
    )
    limits.add_argument(
        "--conversations",
        metavar="N",
        type=options.count,
        default=2,
        help="KV caches to keep, so that what continues a conversation is not computed again",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Serves until Ctrl-C."""
    from jax_mono.extras import require

    uvicorn = require("uvicorn", "serve")
    for module in ("starlette", "pydantic", "prometheus_client", "jinja2"):
        require(module, "serve")
    key = arguments.api_key or settings.api_key()
    if not _loopback(arguments.host) and key is None:
        raise ValueError(f"--host {arguments.host} can be reached by others; add --api-key KEY, or listen on 127.0.0.1")
    listening = _listen(arguments.host, arguments.port)  # before the model is read: a taken port is known at once
    with listening:
        service = _service(arguments)
        from jax_mono.serve.app import make_app

        hosts = {"localhost", "127.0.0.1", "[::1]", arguments.host, *arguments.allow_host}
        app = make_app(service, api_key=key, hosts=hosts if _loopback(arguments.host) else ())
        port = listening.getsockname()[1]
        shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        note(f"{service.model} is served on http://{shown}:{port} (page) and /v1 (API); Ctrl-C ends it", quiet=False)
        config = uvicorn.Config(
            app,
            access_log=arguments.access_log,
            log_level="info" if arguments.access_log else "warning",
            lifespan="on",
            timeout_graceful_shutdown=3,
            limit_concurrency=1000,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port"
        ) from error


def _service(arguments: argparse.Namespace) -> Service:
    from jax_mono.serve.about import facts
    from jax_mono.serve.engine import Engine
    from jax_mono.serve.metrics import Metrics
    from jax_mono.serve.service import Limits, Service

    decoder, path = open_decoder(arguments)
    about = facts(decoder)
    note("compiling", quiet=arguments.quiet)
    engine = Engine(decoder, Metrics(), queue=arguments.queue, conversations=arguments.conversations)
    engine.start()
    name = arguments.name or (path.name if Path(arguments.checkpoint).exists() else arguments.checkpoint)
    limits = Limits(body_bytes=arguments.max_body, deadline_s=arguments.deadline)
    return Service(engine, name, about, limits)


def open_decoder(arguments: argparse.Namespace) -> tuple[Decoder, Path]:
    """Reads a checkpoint and its tokenizer, and packs it.

    Returns:
        The decoder, and where the checkpoint lies.

    Raises:
        ValueError: The context is longer than the model's.
        CheckpointError: There is no such checkpoint.
        TokenizerError: It has no tokenizer.
    """
    from jax_mono.cli.machine import set_up_jax, settle_dtype
    from jax_mono.cli.models import open_weights, pack_decoder
    from jax_mono.tokenizer import Tokenizer

    set_up_jax(arguments.form, arguments.devices)
    settle_dtype(arguments)
    path, source = open_weights(arguments)
    tokenizer = Tokenizer.open(path)
    longest = source.config.max_position_embeddings
    context = arguments.context or min(longest, _CONTEXT)
    if context > longest:
        raise ValueError(f"--context {context} is beyond this model's longest context of {longest}")
    decoder = pack_decoder(
        source, arguments, devices=arguments.devices, form=arguments.form, context=context, tokenizer=tokenizer
    )
    return decoder, path
