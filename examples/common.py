"""What the example programs share: flags, loading, transcripts and errors."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxchat import demo
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import write_atomically
from jaxchat.options import GenerateOptions, with_setting
from jaxchat.talk import ModelLoader

BOX = "box"
"""Stands for the model in the box where a directory is expected."""


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser that knows the flags of every example; the help begins with the program's docstring."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seed", type=int, default=0, help="the same seed gives the same text, e.g. --seed 7")
    made.add_argument(
        "--temperature", type=float, default=0.7, help="0 takes the likeliest token, e.g. --temperature 1.0"
    )
    made.add_argument(
        "--max_new_tokens", type=int, default=200, help="of a message, e.g. --max_new_tokens 60"
    )
    made.add_argument("--quant", help="quantize while loading, e.g. --quant int8")
    made.add_argument("--max_length", type=int, help="the longest context in tokens, e.g. --max_length 4096")
    made.add_argument(
        "--json", metavar="FILE", help="write a transcript, - to standard output, e.g. --json t.json"
    )
    return made


def options_of(args: argparse.Namespace, settings: Sequence[str] = (), flag: str = "") -> GenerateOptions:
    """The sampling options that the flags say, then `NAME=VALUE` settings of one speaker."""
    options = GenerateOptions(
        temperature=args.temperature,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        overflow="truncate_oldest",
    )
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{flag} {text}: expected NAME=VALUE, such as temperature=0.2")
        options = with_setting(options, name, value)
    return options


def loader(args: argparse.Namespace) -> Callable[..., Any]:
    """Loads directories, each once; `box` is the model in the box."""
    load = ModelLoader(quant=args.quant, max_length=args.max_length, said=lambda text: say(f"{text} ..."))

    def model(directory: str, layer_spec: str | None = None) -> Any:
        return load(demo.path() if directory == BOX else directory, layer_spec)

    return model


def say(text: str) -> None:
    """A line beside the conversation."""
    print(text, file=sys.stderr, flush=True)


def write(text: str, args: argparse.Namespace) -> None:
    """Text of the conversation; to standard error if the transcript has standard output."""
    print(text, end="", flush=True, file=sys.stderr if args.json == "-" else sys.stdout)


def save(transcript: dict[str, Any], args: argparse.Namespace) -> None:
    """Writes the transcript where --json says."""
    text = json.dumps(transcript, ensure_ascii=False, indent=2) + "\n"
    if args.json == "-":
        print(text, end="")
    elif args.json:
        try:
            write_atomically(Path(args.json), text.encode())
        except OSError as error:
            raise UsageError(
                f"--json {args.json}: {error.strerror}; name a file that can be written"
            ) from None


def run(main: Callable[[], None]) -> None:
    """Ends the program with `main`'s success, or one line on what went wrong."""
    try:
        main()
    except JaxchatError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
