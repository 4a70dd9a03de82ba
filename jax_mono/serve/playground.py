"""The page at ``/``: one file that loads nothing else, and may do nothing but talk to this server."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json

import jinja2
from starlette.requests import Request
from starlette.responses import Response

from jax_mono import __version__
from jax_mono.serve.service import Service

_SCRIPTS = ("highlight.js", "client.js", "chart.js", "page.js")


class Page:
    """The page, rendered once.

    Its policy names the one style sheet and the one script by their hashes, so nothing else can ever run, whatever a
    model writes.

    Args:
        service: What is served.
        key_needed: Whether the page must ask for a key.
    """

    def __init__(self, service: Service, *, key_needed: bool) -> None:
        files = importlib.resources.files("jax_mono.serve") / "page"
        style = (files / "page.css").read_text()
        script = "\n".join((files / name).read_text() for name in _SCRIPTS)
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        template = environment.from_string((files / "page.html").read_text())
        settings = {
            "model": service.model,
            "chat": service.engine.tokenizer.chat_template is not None,
            "keyNeeded": key_needed,
            "context": service.engine.decoder.context,
            **service.facts,
        }
        # In an attribute, not in a script: there it is text, and the script's hash stays the same for every model.
        self.text = template.render(style=style, script=script, settings=json.dumps(settings), version=__version__)
        self.policy = "; ".join(
            (
                "default-src 'none'",
                f"style-src '{_hash(style)}'",
                f"script-src '{_hash(script)}'",
                "connect-src 'self'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            )
        )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


async def page(request: Request) -> Response:
    """The endpoint."""
    found: Page = request.app.state.page
    headers = {
        "content-security-policy": found.policy,
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }
    return Response(found.text, media_type="text/html", headers=headers)
