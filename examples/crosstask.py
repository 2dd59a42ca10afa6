"""Lets two models talk to each other, or two layer plans over one set of weights.

  python examples/crosstask.py box box "Hello! Who are you?"
  python examples/crosstask.py models/qwen2.5-1.5b models/llama-3-8b "hello!" --reversed_role
  python examples/crosstask.py models/m models/m "hello!" --b_layer_spec 0:20,10: --b temperature=1.1

A says the opening line. Assistants tend to offer each other their help for ever; with --reversed_role A plays
the user, which makes better conversations. A directory that is named twice is loaded once.
"""

import dataclasses
import time
from typing import Annotated

from common import Common, Turns, exit_process, program, say

from jaxchat.options import LENGTHS, Flag
from jaxchat.talk import Speaker, Turn, crosstalk


def _place(name: str, what: str, example: str) -> Flag:
    return Flag(name=name, help=what, example=example, group="Arguments", value="DIR", positional=True)


def _plan(who: str) -> Flag:
    return Flag(help=f"{who}'s layer plan", example=f"--{who.lower()}_layer_spec 0:8,4:", value="LAYERS")


def _system(who: str) -> Flag:
    return Flag(help=f"{who}'s system prompt", example=f"--{who.lower()}_system 'Be brief.'")


def _settings(who: str) -> Flag:
    name = who.lower()
    return Flag(
        name=name,
        help=f"One of {who}'s sampling options; may be given more than once",
        example=f"--{name} temperature=0.2 --{name} top_p=0.9",
        value="NAME=VALUE",
        many=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Common):
    """Who talks, about what, for how long."""

    a_model: Annotated[str, _place("A", "The first model's directory; box is the model in the box", "box")]
    b_model: Annotated[str, _place("B", "The second model's directory", "models/llama-3-8b")]
    opening: Annotated[
        str,
        Flag(help="What A says first", example='"hello!"', group="Arguments", positional=True),
    ]
    reversed_role: Annotated[bool, Flag(help="A plays the user", example="--reversed_role")] = False
    turns: Turns = 10
    conversations: Annotated[
        int,
        Flag(
            help="So many at once, with seeds from --seed on, decoded as one batch",
            example="--conversations 4",
            limits=LENGTHS,
        ),
    ] = 1
    a_layer_spec: Annotated[str | None, _plan("A")] = None
    a_system: Annotated[str | None, _system("A")] = None
    a_settings: Annotated[tuple[str, ...], _settings("A")] = ()
    b_layer_spec: Annotated[str | None, _plan("B")] = None
    b_system: Annotated[str | None, _system("B")] = None
    b_settings: Annotated[tuple[str, ...], _settings("B")] = ()


def talk(request: Request) -> None:
    """Lets them talk, and writes the transcript."""
    options = {
        "A": request.options(request.a_settings, "--a"),
        "B": request.options(request.b_settings, "--b"),
    }
    load = request.loader()
    a = Speaker(
        name="A",
        model=load(request.a_model, request.a_layer_spec),
        system=request.a_system,
        reversed_role=request.reversed_role,
        options=options["A"],
    )
    b = Speaker(
        name="B",
        model=load(request.b_model, request.b_layer_spec),
        system=request.b_system,
        options=options["B"],
    )
    turns: list[Turn] = []
    start = time.perf_counter()
    try:
        for turn in crosstalk(
            a, b, request.opening, turns=request.turns, conversations=request.conversations
        ):
            turns.append(turn)
            number = f"{turn.conversation + 1} " if request.conversations > 1 else ""
            request.write(f"{number}{turn.speaker} > {turn.text}\n")
            if turn.ends:
                say(f"({number}ends: {turn.ends})")
    except KeyboardInterrupt:
        say("(ends: interrupted)")
    transcript = {
        "program": "crosstask",
        "models": {s.name: {"directory": d, "layer_spec": str(s.model.plan), "system": s.system,
                            "reversed_role": s.reversed_role, "options": vars(s.options)}
                   for s, d in ((a, request.a_model), (b, request.b_model))},
        "seed": request.seed,
        "seconds": round(time.perf_counter() - start, 3),
        "turns": [vars(turn) for turn in turns],
    }  # fmt: skip
    request.save(transcript)


main = program("crosstask", __doc__, Request, talk)

if __name__ == "__main__":
    exit_process(main())
