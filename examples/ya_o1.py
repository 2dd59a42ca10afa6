"""Yet another o1: one model thinks aloud, is nudged to think again, and another sums up.

  python examples/ya_o1.py box box -q "Tell me a story about a cat."
  python examples/ya_o1.py models/qwen2.5-1.5b models/llama-3-8b -q "How many r are in strawberry?"
  python examples/ya_o1.py models/m models/m -q "..." --nudge "\\nWait. Is that right?\\n" --budget 500

The thought begins with --prefix; every --nudge is appended to it, and the model goes on from there in the
same reply. \\n is a line break. The summarizer then answers from question and thought.
"""

import contextlib
import dataclasses
import sys
from typing import Any

from common import loader, options_of, parser, run, save, say, write

from jaxchat.options import unescape
from jaxchat.talk import Nudge, Thinker
from jaxchat.talk.thinking import NUDGES, PREFIX, PROMPT, SYSTEM


def main() -> None:
    """Runs the program."""
    flags = parser(__doc__)
    flags.add_argument("thinker", help="the directory of the model that thinks; box is the model in the box")
    flags.add_argument("summarizer", help="the directory of the model that answers; may be the same")
    flags.add_argument(
        "-q", "--question", action="append", default=[],
        help='ask this and end; may be given more than once, e.g. -q "Why is the sky blue?"',
    )  # fmt: skip
    flags.add_argument("--turns", type=int, default=100, help="end after so many questions, e.g. --turns 3")
    flags.add_argument(
        "--thinker_layer_spec", metavar="LAYERS", help="the thinker's layer plan, e.g. 0:20,10:"
    )
    flags.add_argument("--summarizer_layer_spec", metavar="LAYERS", help="the summarizer's, e.g. 0:30")
    flags.add_argument("--prefix", default=PREFIX, help="how a thought begins, e.g. --prefix 'Hmm. '")
    flags.add_argument(
        "--nudge", action="append", metavar="TEXT",
        help="appended to the thought to make it go on; may be given more than once, e.g. --nudge 'Hmm. '",
    )  # fmt: skip
    flags.add_argument("--budget", type=int, help="of tokens for the whole thought, e.g. --budget 500")
    flags.add_argument("--system", default=SYSTEM, help="the summarizer's system prompt, e.g. --system ''")
    flags.add_argument("--prompt", default=PROMPT, help="its task, e.g. --prompt '{question} {thoughts}'")
    args = flags.parse_args()
    options = options_of(args)
    load = loader(args)
    nudges = NUDGES if args.nudge is None else tuple(unescape(text, "--nudge") for text in args.nudge)
    thinker = Thinker(
        thinker=load(args.thinker, args.thinker_layer_spec),
        summarizer=load(args.summarizer, args.summarizer_layer_spec),
        prefix=unescape(args.prefix, "--prefix"),
        nudges=[Nudge(text) for text in nudges],
        budget=args.budget,
        system=args.system or None,
        prompt=args.prompt,
        options=options,
        summary_options=dataclasses.replace(options, temperature=0.0),
    )
    asked: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):
        for question in args.question or typed():
            asked.append(answer(thinker, question, args))
            if len(asked) == args.turns:
                break
    save({"program": "ya_o1", "prefix": thinker.prefix, "nudges": list(nudges), "budget": args.budget,
          "seed": args.seed, "turns": asked}, args)  # fmt: skip


def answer(thinker: Thinker, question: str, args: Any) -> dict[str, Any]:
    """Thought and answer, as they come."""
    parts = {"think": "", "nudge": "", "answer": ""}
    titles = {"think": "Thought", "nudge": "", "answer": "Answer"}
    for step, text in thinker.ask(question):
        if not parts[step] and titles[step]:
            write(f"{'' if step == 'think' else chr(10)}{titles[step]} > ", args)
        parts[step] += text
        write(text, args)
    write("\n", args)
    return {"question": question, "thought": parts["think"] + parts["nudge"], "answer": parts["answer"]}


def typed() -> Any:
    """Questions from standard input."""
    if sys.stdin.isatty():
        say("Ask something; Ctrl-D leaves.")
    return (line.strip() for line in sys.stdin if line.strip())


if __name__ == "__main__":
    run(main)
