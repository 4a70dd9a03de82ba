"""A server in this process, on a real port, around a tiny model or a synthetic decoder."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jax.numpy as jnp
import openai
import pytest
import uvicorn
from cli.conftest import END, write_checkpoint
from tiny import tiny

import jax_mono
from jax_mono.decoder import Decoder
from jax_mono.serve.app import make_app
from jax_mono.serve.engine import Engine
from jax_mono.serve.metrics import Metrics
from jax_mono.serve.service import Limits, Service

NAME = "tiny"
CONTEXT = 512


@dataclass
class Served:
    """A running server."""

    url: str
    engine: Engine

    @property
    def client(self) -> openai.OpenAI:
        """The client that people have."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """A request without a client library's help."""
        return httpx.post(f"{self.url}/v1/{path}", json=body, timeout=60)


@contextmanager
def serving(
    decoder: Any,
    *,
    queue: int = 64,
    conversations: int = 2,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    facts: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Served]:
    """Serves a decoder on a free port."""
    engine = Engine(decoder, Metrics(), queue=queue, conversations=conversations)
    engine.start()
    app = make_app(Service(engine, NAME, facts or {}, limits), **options)
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield Served(f"http://127.0.0.1:{socket.getsockname()[1]}", engine)
    finally:
        server.should_exit = True
        thread.join(30)
        socket.close()
        assert not thread.is_alive() and not engine.alive


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny("llama", vocab_size=320, eos_token_ids=(END,), max_position_embeddings=CONTEXT)
    return write_checkpoint(tmp_path_factory.mktemp("served") / NAME, config)


def load(checkpoint: Path) -> Decoder:
    return jax_mono.load(checkpoint, dtype=jnp.float32, blocks=1)


@pytest.fixture(scope="session")
def direct(checkpoint: Path) -> Decoder:
    """The same model, to be asked without a server."""
    return load(checkpoint)


@pytest.fixture(scope="session")
def served(checkpoint: Path) -> Iterator[Served]:
    """The tiny model behind a server."""
    with serving(load(checkpoint)) as found:
        yield found


@pytest.fixture(scope="session")
def client(served: Served) -> openai.OpenAI:
    return served.client
