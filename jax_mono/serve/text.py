"""From tokens to text that may go out: stop strings, and which token says which part of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jax_mono.stream import Token
from jax_mono.tokenizer import Tokenizer


@dataclass(frozen=True)
class Entry:
    """A token and where its text begins.

    Attributes:
        id: The token.
        logprob: Its log-probability; None for the first token of a text.
        start: Characters of the text that were complete before it.
    """

    id: int
    logprob: float | None
    start: int


@dataclass(frozen=True)
class Delta:
    """What has become certain: text, and the tokens that say it."""

    text: str
    entries: tuple[Entry, ...]


class StopStrings:
    """Holds back text that may turn out to be the beginning of a stop string.

    Args:
        strings: Each not empty.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Takes text and returns what no stop string can claim any more."""
        if not self._strings:
            return piece
        text = self._held + piece
        starts = [start for string in self._strings if (start := text.find(string)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = next(
            (
                length
                for length in range(min(self._longest - 1, len(text)), 0, -1)
                if any(string.startswith(text[-length:]) for string in self._strings)
            ),
            0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Ends the text and returns what was held back."""
        held, self._held = self._held, ""
        return held


class TextRun:
    """The text of one generation as it grows.

    Args:
        tokenizer: The model's.
        stops: Tokens that end the generation; they leave no text.
        strings: Strings that end it; they leave no text either.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[int], strings: Iterable[str]) -> None:
        self._pieces, self._stops, self._strings = tokenizer.stream(), frozenset(stops), StopStrings(strings)
        self._decoded = self._sent = self.count = 0
        self._waiting: list[Entry] = []
        self.stopped = False

    def feed(self, tokens: Iterable[Token]) -> Delta:
        """Takes tokens until one of them ends the generation, and returns what has become certain."""
        text = ""
        for token in tokens:
            self.count += 1
            if token.id in self._stops:
                self.stopped = True
                break
            self._waiting.append(Entry(token.id, token.logprob, self._decoded))
            piece = self._pieces.feed(token.id)
            self._decoded += len(piece)
            text += self._strings.feed(piece)
            if self._strings.found:
                self.stopped = True
                break
        return self._release(text)

    def flush(self) -> Delta:
        """Ends the text and returns the rest; tokens of a stop string are dropped."""
        if self._strings.found:
            return self._release("", last=True)
        piece = self._pieces.flush()
        return self._release(self._strings.feed(piece) + self._strings.flush(), last=True)

    def _release(self, text: str, *, last: bool = False) -> Delta:
        self._sent += len(text)
        if last and not self._strings.found:
            ready = len(self._waiting)
        else:
            # A token waits until all of its text is out: its end is where the next one begins.
            ends = [entry.start for entry in self._waiting[1:]] + [self._decoded]
            ready = sum(end <= self._sent for end in ends)
            if self._strings.found and ready < len(self._waiting) and self._waiting[ready].start < self._sent:
                ready += 1  # says text on both sides of where the stop string begins
        entries, self._waiting = tuple(self._waiting[:ready]), self._waiting[ready:]
        return Delta(text, entries)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is no whole character as ``bytes:`` and its bytes in hexadecimal."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def echo_entries(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[float], hidden: int
) -> tuple[str, tuple[Entry, ...]]:
    """The text of a prompt, and its tokens.

    Args:
        tokenizer: The model's.
        tokens: The prompt.
        logprobs: Of all tokens but the first; empty if not known.
        hidden: Tokens at the start that are no part of the text, such as one that starts any text.

    Returns:
        The text and an entry per token.
    """
    pieces, text, entries = tokenizer.stream(skip_special_tokens=False), "", []
    for index, token in enumerate(tokens):
        entries.append(Entry(token, logprobs[index - 1] if index and len(logprobs) else None, len(text)))
        text += "" if index < hidden else pieces.feed(token)
    return text + pieces.flush(), tuple(entries)
