"""Where a prompt comes from, and whether it is a turn of a conversation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_mono.tokenizer import Tokenizer


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--prompt`` and what belongs to it."""
    group = parser.add_argument_group("prompt", "from --prompt, from --prompt-file, or from standard input")
    source = group.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    source.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file with the prompt; - is standard input")
    group.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="whether the prompt is a turn of a conversation, put into the checkpoint's chat template. "
        "If absent: yes for models that were tuned for conversation",
    )
    group.add_argument("--system", metavar="TEXT", help="instructions before the first turn; needs a chat template")


def read_text(arguments: argparse.Namespace) -> str:
    """Reads the prompt.

    Raises:
        ValueError: There is none, or it is not text.
        OSError: The file cannot be read.
    """
    if arguments.prompt is not None:
        text = arguments.prompt
    elif arguments.prompt_file not in (None, "-"):
        try:
            text = Path(arguments.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{arguments.prompt_file}: not UTF-8 text ({error})") from error
    elif arguments.prompt_file is None and sys.stdin.isatty():
        raise ValueError("there is no prompt; pass --prompt TEXT or --prompt-file FILE, or pipe one in")
    else:
        text = sys.stdin.read()
    if not text:
        raise ValueError("the prompt is empty")
    return text


def encode(arguments: argparse.Namespace, text: str, tokenizer: Tokenizer, ends: Iterable[int]) -> list[int]:
    """Turns the prompt into tokens.

    Args:
        arguments: ``chat`` and ``system`` count.
        text: The prompt.
        tokenizer: The checkpoint's.
        ends: Tokens that end a generation of this model.

    Returns:
        Token ids.

    Raises:
        TokenizerError: A conversation was asked for, and the checkpoint has no template or it refuses.
        ValueError: ``--system`` without a conversation.
    """
    chat = arguments.chat
    if chat is None:
        chat = arguments.system is not None or ends_turns(tokenizer, ends)
    if not chat:
        if arguments.system is not None:
            raise ValueError("--system belongs to a conversation; remove --no-chat")
        return tokenizer.encode(text)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return tokenizer.chat([*system, {"role": "user", "content": text}])


def ends_turns(tokenizer: Tokenizer, ends: Iterable[int]) -> bool:
    """Whether a model was tuned for conversation: it ends a generation as its template ends an answer.

    Base models often carry the template of their sibling, but stop at the end of a text only.
    """
    from jax_mono.tokenizer import TokenizerError

    if tokenizer.chat_template is None:
        return False
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        question = tokenizer.chat(turns[:1], add_generation_prompt=True)
        both = tokenizer.chat(turns, add_generation_prompt=False)
    except TokenizerError:
        return False
    return bool(set(both[len(question) :]) & set(ends))
