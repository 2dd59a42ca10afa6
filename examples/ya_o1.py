"""Yet another o1: one model thinks aloud, is nudged to think again, and another sums up.

  python examples/ya_o1.py box box -q "Tell me a story about a cat."
  python examples/ya_o1.py models/qwen2.5-1.5b models/llama-3-8b -q "How many r are in strawberry?"
  python examples/ya_o1.py models/m models/m -q "..." --nudge "\\nWait. Is that right?\\n" --budget 500

The thought begins with --prefix; every --nudge is appended to it, and the model goes on from there in the
same reply. \\n is a line break. The summarizer then answers from question and thought. The model in the box
(box) cannot reason: if not told otherwise it thinks in paragraphs of a story, and says who is in it.
"""

import contextlib
import dataclasses
from typing import Annotated, Any, NamedTuple

from common import BOX, Common, Questions, Turns, exit_process, program, typed

from jaxchat.options import LENGTHS, Flag, unescape
from jaxchat.talk import Nudge, Thinker
from jaxchat.talk.thinking import NUDGES, PREFIX, PROMPT, SYSTEM

BOX_PREFIX, BOX_NUDGES = "Once upon a time, ", ("\nThe next day, ", "\nIn the end, ")
BOX_PROMPT = "{thoughts}\n\nWho is in the story?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Common):
    """Who thinks about what, and how long."""

    thinker: Annotated[
        str,
        Flag(
            help="The directory of the model that thinks; box is the model in the box",
            example="box",
            group="Arguments",
            value="DIR",
            positional=True,
        ),
    ]
    summarizer: Annotated[
        str,
        Flag(
            help="The directory of the model that answers; may be the same",
            example="models/llama-3-8b",
            group="Arguments",
            value="DIR",
            positional=True,
        ),
    ]
    questions: Questions = ()
    turns: Turns = 100
    thinker_layer_spec: Annotated[
        str | None,
        Flag(help="The thinker's layer plan", example="--thinker_layer_spec 0:20,10:", value="LAYERS"),
    ] = None
    summarizer_layer_spec: Annotated[
        str | None,
        Flag(help="The summarizer's layer plan", example="--summarizer_layer_spec 0:30", value="LAYERS"),
    ] = None
    prefix: Annotated[
        str | None,
        Flag(
            help="How a thought begins",
            example="--prefix 'Hmm. '",
            read=lambda text: unescape(text, "--prefix"),
            shown=f"{PREFIX!r}, of box {BOX_PREFIX!r}",
        ),
    ] = None
    nudges: Annotated[
        tuple[str, ...] | None,
        Flag(
            name="nudge",
            help="Appended to the thought to make it go on; may be given more than once",
            example="--nudge 'Hmm. '",
            many=True,
            read=lambda texts: tuple(unescape(text, "--nudge") for text in texts),
            shown=f"{', '.join(map(repr, NUDGES))}, of box {', '.join(map(repr, BOX_NUDGES))}",
        ),
    ] = None
    budget: Annotated[
        int | None, Flag(help="Of tokens for the whole thought", example="--budget 500", limits=LENGTHS)
    ] = None
    system: Annotated[
        str | None,
        Flag(
            help="The summarizer's system prompt, '' for none",
            example="--system 'Be brief.'",
            shown=f"{SYSTEM!r}, of box none",
        ),
    ] = None
    prompt: Annotated[
        str | None,
        Flag(
            help="The summarizer's task",
            example="--prompt '{question} {thoughts}'",
            shown=f"{PROMPT!r}, of box {BOX_PROMPT!r}",
        ),
    ] = None


class Words(NamedTuple):
    """What is said to the two models, see `Thinker`."""

    prefix: str
    nudges: tuple[str, ...]
    system: str
    prompt: str


def words_of(request: Request) -> Words:
    """What the flags say, and where they say nothing what suits the models."""
    thinks, sums_up = request.thinker == BOX, request.summarizer == BOX
    usual = Words(
        prefix=BOX_PREFIX if thinks else PREFIX,
        nudges=BOX_NUDGES if thinks else NUDGES,
        system="" if sums_up else SYSTEM,
        prompt=BOX_PROMPT if sums_up else PROMPT,
    )
    own = {name: getattr(request, name) for name in Words._fields}
    return usual._replace(**{name: value for name, value in own.items() if value is not None})


def think(request: Request) -> None:
    """Thinks and answers, and writes the transcript."""
    words = words_of(request)
    options = request.options()
    if request.thinker == BOX:  # a stretch is a paragraph
        options = dataclasses.replace(options, stop="\n")
    load = request.loader()
    thinker = Thinker(
        thinker=load(request.thinker, request.thinker_layer_spec),
        summarizer=load(request.summarizer, request.summarizer_layer_spec),
        prefix=words.prefix,
        nudges=[Nudge(text) for text in words.nudges],
        budget=request.budget,
        system=words.system or None,
        prompt=words.prompt,
        options=options,
        summary_options=dataclasses.replace(options, temperature=0.0, stop=()),
    )
    asked: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):
        for question in request.questions or typed():
            asked.append(answer(thinker, question, request))
            if len(asked) == request.turns:
                break
    request.save({"program": "ya_o1", "prefix": thinker.prefix, "nudges": list(words.nudges),
                  "budget": request.budget, "seed": request.seed, "turns": asked})  # fmt: skip


def answer(thinker: Thinker, question: str, request: Request) -> dict[str, Any]:
    """Thought and answer, as they come."""
    parts = {"think": "", "nudge": "", "answer": ""}
    titles = {"think": "Thought", "nudge": "", "answer": "Answer"}
    for step, text in thinker.ask(question):
        if not parts[step] and titles[step]:
            request.write(f"{'' if step == 'think' else chr(10)}{titles[step]} > ")
        parts[step] += text
        request.write(text)
    request.write("\n")
    return {"question": question, "thought": parts["think"] + parts["nudge"], "answer": parts["answer"]}


main = program("ya_o1", __doc__, Request, think)

if __name__ == "__main__":
    exit_process(main())
