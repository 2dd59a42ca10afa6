"""A panel of experts to chat with; a selector decides who answers.

  python examples/threecobblers.py                                # three plans of the model in the box
  python examples/threecobblers.py experts.yaml -q "What is 2 + 2?"
  python examples/threecobblers.py experts.yaml --ask_all         # every expert answers, in one batch

The selector scores the experts' names as answers to "which class is this question?" (or, where experts have
`says`, these as beginnings of its own answer) and tells how probable each is. It decides anew for every
question, or with --sticky once until /restart. The YAML names experts, each a model or a layer plan, with
descriptions; see `jaxchat.talk.experts.read_panel`.
"""

import contextlib
import dataclasses
from typing import Annotated, Any

from common import BOX, Common, Questions, Turns, exit_process, program, say, typed

from jaxchat.options import Flag
from jaxchat.talk import Expert, Panel
from jaxchat.talk.experts import read_panel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Common):
    """Whom to ask what."""

    panel: Annotated[
        str | None,
        Flag(
            name="file",
            help="YAML of experts",
            example="experts.yaml",
            group="Arguments",
            value="FILE",
            positional=True,
        ),
    ] = None
    questions: Questions = ()
    sticky: Annotated[bool, Flag(help="The first expert stays", example="--sticky")] = False
    ask_all: Annotated[bool, Flag(help="Every expert answers", example="--ask_all")] = False
    turns: Turns = 100


_BOX_EXPERTS = {
    "Stories": ("Once upon a time", None),
    "Greetings": ("Hello", "0:6,5:"),
    "Myself": ("I am", "[0, 1, [2, 0, 1], 3, 4, 5, 6, 7]"),
}
"""Name -> how an answer of this kind begins, and a layer plan."""


def box_panel(request: Request) -> Panel:
    """Three experts over the model in the box: as it is, with a layer twice, and without an attention.

    It knows no classes, but how answers begin: that is what it is asked for.
    """
    load = request.loader()
    experts = [
        Expert(name=name, says=says, model=load(BOX, spec), options=request.options())
        for name, (says, spec) in _BOX_EXPERTS.items()
    ]
    return Panel(experts, load(BOX), prompt="{question}", sticky=request.sticky)


def ask(request: Request) -> None:
    """Asks what is to be asked, and writes the transcript."""
    if request.panel is None:
        panel = box_panel(request)
    else:
        panel = read_panel(request.panel, request.loader(), request.options())
    panel.sticky = panel.sticky or request.sticky
    answer_one = answer_of_all if request.ask_all else answer
    asked: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):
        for question in request.questions or typed(panel.restart):
            asked.append(answer_one(panel, question, request))
            if len(asked) == request.turns:
                break
    experts = {
        e.name: {"description": e.description, "layer_spec": str(e.model.plan), "system": e.system}
        for e in panel.experts.values()
    }
    request.save({"program": "threecobblers", "experts": experts, "seed": request.seed, "turns": asked})


def answer(panel: Panel, question: str, request: Request) -> dict[str, Any]:
    """The chosen expert's answer, as it comes."""
    choice, stream = panel.ask(question)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in choice.probabilities.items())
    say(f"({shares})")
    request.write(f"{choice.name} > ")
    for piece in stream:
        request.write(piece)
    request.write("\n")
    return {"question": question, "expert": choice.name, "probabilities": dict(choice.probabilities),
            "answer": stream.result.text}  # fmt: skip


def answer_of_all(panel: Panel, question: str, request: Request) -> dict[str, Any]:
    """Every expert's answer."""
    answers = {}
    for name, message in panel.ask_all(question):
        request.write(f"{name} > {message.text}\n")
        answers[name] = message.text
    return {"question": question, "answers": answers}


main = program("threecobblers", __doc__, Request, ask)

if __name__ == "__main__":
    exit_process(main())
