"""Text in and out: encoding, decoding as tokens arrive, and chat templates."""

from __future__ import annotations

import codecs
import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_mono.extras import require
from jax_mono.models.gguf_file import GGUFFile

REPLACEMENT = "\ufffd"

# How SentencePiece vocabularies spell a byte and a space.
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_SPACE_PIECE = "\u2581"


class TokenizerError(ValueError):
    """A tokenizer that cannot be built, or messages that it refuses; the message says why and what to do."""


class NoTokenizerError(TokenizerError):
    """There is no tokenizer where one was looked for."""


class Tokenizer:
    """A tokenizer with what generation needs to know about it.

    Attributes:
        backend: The ``tokenizers.Tokenizer``.
        bos_id: Token that starts a text, or None.
        eos_ids: Tokens that end a text or a turn.
        chat_template: Jinja template that turns messages into text, or None.
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Wraps a tokenizer.

        Args:
            backend: A ``tokenizers.Tokenizer``.
            bos_id: Token that starts a text, or None.
            eos_ids: Tokens that end a text or a turn.
            add_bos: Whether ``encode`` starts with ``bos_id``. None leaves it to the post-processor of
                ``backend``.
            chat_template: Jinja template, or None.
            special_tokens: Variables of the template such as ``bos_token`` and ``eos_token``.
        """
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.chat_template = chat_template
        self._add_bos = add_bos
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Opens the tokenizer that lies with a checkpoint.

        Args:
            path: A GGUF file, a directory with ``tokenizer.json``, or a directory with one GGUF file.

        Returns:
            The tokenizer.

        Raises:
            NoTokenizerError: If there is none.
            TokenizerError: If it cannot be read.
            MissingExtraError: If the package ``tokenizers`` is not installed.
        """
        path = Path(path)
        if path.is_file() and path.suffix != ".json":
            return cls.from_gguf(path)
        if (path / "tokenizer.json").is_file():
            return cls.from_hf(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return cls.from_gguf(files[0])
        raise NoTokenizerError(
            f"{path}: no tokenizer here; looked for tokenizer.json and one .gguf file. Copy tokenizer.json "
            "and tokenizer_config.json of the model into this directory"
        )

    @classmethod
    def from_hf(cls, directory: str | Path) -> Tokenizer:
        """Opens ``tokenizer.json`` with its companions.

        Args:
            directory: Also ``tokenizer_config.json``, ``chat_template.jinja`` and ``generation_config.json``
                are read from it where they exist.

        Returns:
            The tokenizer.

        Raises:
            TokenizerError: If a file is missing or damaged.
        """
        directory = Path(directory)
        tokenizers = require("tokenizers", "hf")
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(f"{file}: no such file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more precise
            raise TokenizerError(f"{file}: not readable ({error}); download it again") from error
        config = _json_object(directory / "tokenizer_config.json")
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        ids = {name: backend.token_to_id(content) for name, content in special.items()}
        generation = _json_object(directory / "generation_config.json").get("eos_token_id")
        generation = generation if isinstance(generation, list) else [generation]
        template = _template_of(config.get("chat_template"))
        if (directory / "chat_template.jinja").is_file():
            template = (directory / "chat_template.jinja").read_text()
        return cls(
            backend,
            bos_id=ids.get("bos_token"),
            eos_ids=[token for token in (ids.get("eos_token"), *generation) if token is not None],
            add_bos=config.get("add_bos_token"),
            chat_template=template,
            special_tokens=special,
        )

    @classmethod
    def from_gguf(cls, file: str | Path | GGUFFile) -> Tokenizer:
        """Builds the tokenizer that the metadata of a GGUF file describes.

        Args:
            file: The file.

        Returns:
            The tokenizer.

        Raises:
            TokenizerError: If the kind of tokenizer is not supported.
        """
        from jax_mono.tokenizer_gguf import build

        return cls(**build(file if isinstance(file, GGUFFile) else GGUFFile(file)))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's table may be larger."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turns text into tokens.

        Special tokens that are spelled out in the text are recognised.

        Args:
            text: Any text.
            add_special_tokens: Whether to start with the token that the model expects at the start of a text,
                if any.

        Returns:
            Token ids.
        """
        if not add_special_tokens or self._add_bos is False:
            return self.backend.encode(text, add_special_tokens=False).ids
        ids = self.backend.encode(text, add_special_tokens=True).ids
        if self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turns tokens into text; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, which need not be whole characters; none for one that does not exist."""
        piece = self.backend.id_to_token(token)
        if piece is None:
            return b""
        if isinstance(self.backend.decoder, require("tokenizers", "hf").decoders.ByteLevel):
            return _piece_bytes(piece)
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace(_SPACE_PIECE, " ").encode()

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Returns a decoder for tokens that arrive one by one."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Turns a conversation into tokens.

        Args:
            messages: Each with ``role`` and ``content``.
            add_generation_prompt: Whether to end with the opening of the assistant's turn.
            variables: More variables for the template, such as ``tools``.

        Returns:
            Token ids.

        Raises:
            TokenizerError: If there is no template, or it refuses the messages.
        """
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), add_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Turns a conversation into the text that ``chat`` encodes; arguments as there."""
        if self.chat_template is None:
            raise TokenizerError(
                "this tokenizer has no chat template; use a model tuned for conversation, or plain text"
            )
        return _render(
            self.chat_template,
            {
                **self._special_tokens,
                "messages": [dict(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
                "tools": None,
                "documents": None,
                **variables,
            },
        )


class StreamDecoder:
    """Decodes tokens one by one, in time linear in their number.

    Text is handed out as soon as it is complete UTF-8. All pieces together are what ``decode`` makes of all
    tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """Starts a text.

        Args:
            tokenizer: The tokenizer.
            skip_special_tokens: Whether special tokens leave no text.
        """
        self._backend = tokenizer.backend
        added = self._backend.get_added_tokens_decoder()
        self._skipped = {token for token, about in added.items() if about.special} if skip_special_tokens else set()
        byte_level = isinstance(self._backend.decoder, require("tokenizers", "hf").decoders.ByteLevel)
        self._pieces: _Bytes | _Window = _Bytes(self._backend) if byte_level else _Window(self._backend)

    def feed(self, token: int) -> str:
        """Takes one token and returns the text that it completes, possibly none."""
        return "" if token in self._skipped else self._pieces.feed(token)

    def flush(self) -> str:
        """Ends the text and returns the rest; an incomplete character becomes U+FFFD."""
        return self._pieces.flush()


class _Bytes:
    """Byte-level vocabularies: every token is a string of bytes, so UTF-8 can be decoded incrementally."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        piece = self._backend.id_to_token(token)
        return "" if piece is None else self._utf8.decode(_piece_bytes(piece))

    def flush(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Maps the letters by which byte-level vocabularies spell bytes to those bytes.

    Bytes that print stand for themselves, all others for the letters from U+0100 on.
    """
    printing = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _piece_bytes(piece: str) -> bytes:
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[letter] for letter in piece])
    except KeyError:  # an added token with other letters stands for its own text
        return piece.encode()


class _Window:
    """Any other vocabulary: decodes the last few tokens together and hands out what they add."""

    # A character has at most 4 bytes, so a text that still ends in U+FFFD after this many tokens is invalid
    # there.
    _LIMIT = 8

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._done: list[int] = []  # tokens whose text is out; they are the context of the next ones
        self._open: list[int] = []

    def feed(self, token: int) -> str:
        self._open.append(token)
        text = self._new_text()
        full = len(self._open) >= self._LIMIT
        if full or (text and not text.endswith(REPLACEMENT)):
            # The context is the tokens of whole characters: half a character would spoil those after it.
            self._done, self._open = self._open, []
            return text
        return ""

    def flush(self) -> str:
        text = self._new_text()
        self._done, self._open = [], []
        return text

    def _new_text(self) -> str:
        before = self._backend.decode(self._done, skip_special_tokens=False)
        return self._backend.decode(self._done + self._open, skip_special_tokens=False)[len(before) :]


def _json_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_bytes())
    except ValueError as error:
        raise TokenizerError(f"{file}: not readable as JSON ({error}); download it again") from error
    return raw if isinstance(raw, dict) else {}


def _template_of(raw: Any) -> str | None:
    """Picks the template from ``tokenizer_config.json``, where it may be one of several with names."""
    if isinstance(raw, list):
        raw = {entry.get("name"): entry.get("template") for entry in raw}.get("default")
    return raw if isinstance(raw, str) else None


def _render(template: str, variables: Mapping[str, Any]) -> str:
    """Renders a chat template in a sandbox, with the helpers that templates expect."""
    jinja2 = require("jinja2", "hf")
    require("jinja2.sandbox", "hf")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(**variables)
    except jinja2.exceptions.TemplateError as error:
        raise TokenizerError(f"the chat template of this model refuses the messages: {error}") from error
