"""What the example programs share: flags, loading, transcripts."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from jaxchat import demo
from jaxchat.cli.command_line import Command, exit_process, run
from jaxchat.cli.terminal.commands import explained_word
from jaxchat.errors import UsageError
from jaxchat.files import try_to_replace, write_atomically
from jaxchat.options import LENGTHS, SAMPLING_RANGES, SEEDS, Flag, GenerateOptions, with_setting
from jaxchat.pallas.backends import use_32_bits
from jaxchat.talk import ModelLoader
from jaxchat.visible import visible

BOX = demo.NAME
"""Stands for the model in the box where a directory is expected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """The flags of every example."""

    seed: Annotated[int, Flag(help="The same seed gives the same text", example="--seed 7", limits=SEEDS)] = 0
    temperature: Annotated[
        float,
        Flag(
            help="0 takes the likeliest token",
            example="--temperature 1.0",
            limits=SAMPLING_RANGES["temperature"],
        ),
    ] = 0.7
    max_new_tokens: Annotated[
        int, Flag(help="Of a message, at most", example="--max_new_tokens 60", limits=LENGTHS)
    ] = 200
    quant: Annotated[
        str | None, Flag(help="Quantize while loading", example="--quant int8", value="FORMAT")
    ] = None
    max_length: Annotated[
        int | None, Flag(help="The longest context in tokens", example="--max_length 4096", limits=LENGTHS)
    ] = None
    json: Annotated[
        str | None,
        Flag(help="Write a transcript, - to standard output", example="--json t.json", value="FILE"),
    ] = None

    def options(self, settings: Sequence[str] = (), flag: str = "") -> GenerateOptions:
        """The sampling options that the flags say, then `NAME=VALUE` settings of one speaker."""
        options = GenerateOptions(
            temperature=self.temperature,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
            overflow="truncate_oldest",
        )
        for text in settings:
            name, equals, value = text.partition("=")
            if not equals:
                raise UsageError(f"{flag} {text}: expected NAME=VALUE, such as temperature=0.2")
            options = with_setting(options, name, value, where=f"{flag} ")
        return options

    def loader(self) -> ModelLoader:
        """Loads directories, each once; `box` is the model in the box."""
        use_32_bits()
        return ModelLoader(quant=self.quant, max_length=self.max_length, said=lambda text: say(f"{text} ..."))

    def write(self, text: str) -> None:
        """Writes text of the conversation; to standard error if the transcript has standard output."""
        stream = sys.stderr if self.json == "-" else sys.stdout
        print(visible(text) if stream.isatty() else text, end="", flush=True, file=stream)

    def save(self, transcript: dict[str, Any]) -> None:
        """Writes the transcript where --json says."""
        text = json.dumps(transcript, ensure_ascii=False, indent=2) + "\n"
        if self.json == "-":
            print(text, end="")
        elif self.json is not None:
            self._at_file(lambda path: write_atomically(path, text.encode()))

    def try_to_save(self) -> None:
        """Refuses a --json that could not be written in the end."""
        if self.json not in (None, "-"):
            self._at_file(try_to_replace)

    def _at_file(self, act: Callable[[Path], None]) -> None:
        try:
            act(Path(self.json or ""))
        except OSError as error:
            raise UsageError(
                f"--json {self.json}: {error.strerror}; name a file that can be written"
            ) from None


R = TypeVar("R", bound=Common)
Turns = Annotated[int, Flag(help="End after so many", example="--turns 20", limits=LENGTHS)]


Questions = Annotated[
    tuple[str, ...],
    Flag(
        name="question",
        help="Ask this and end; may be given more than once",
        example='-q "Tell me a story."',
        short="q",
        many=True,
    ),
]


def say(text: str) -> None:
    """Writes a line beside the conversation."""
    print(visible(text), file=sys.stderr, flush=True)


def typed(restart: Callable[[], None] | None = None) -> Iterator[str]:
    """Questions from standard input, until its end or /quit; /help explains, and no model gets to see it.

    Args:
      restart: what /restart does, where there is something to forget.
    """
    prompts = sys.stdin.isatty()
    known = "/quit or Ctrl-D leaves" + (", /restart forgets" if restart else "")
    if prompts:
        say(f"Ask something; {known}.")
    explained = ""
    while True:
        if prompts:
            print("You  > ", end="", flush=True)
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text in ("/quit", "/exit", "/bye"):
            return
        if text in ("/restart", "/clear") and restart:
            restart()
            say("forgot what was said")
        elif text.startswith("/") and not text.startswith("//"):
            unknown = "" if text in ("/help", "/?") else f"no command {text}; "
            say(f"{unknown}{known}; a question that begins with a slash is typed with two")
        elif prompts and text != explained and (advice := explained_word(text)):
            say(advice)
            explained = text
        elif text:
            yield text.removeprefix("/")
            explained = ""


def program(name: str, doc: str | None, request: type[R], body: Callable[[R], None]) -> Callable[..., int]:
    """The `main` of an example: its help is the module's docstring and the flags of `request`."""

    def do(filled: R, given: frozenset[str]) -> int:
        filled.try_to_save()
        body(filled)
        return 0

    command = Command(usage=f"{doc}\n", request=request, run=do, stray="quote what has spaces")

    def main(argv: Sequence[str] | None = None) -> int:
        """Runs the program and returns its exit code."""
        return run(command, argv, program=f"python examples/{name}.py")

    return main


__all__ = ["BOX", "Common", "Questions", "Turns", "exit_process", "program", "say", "typed"]
