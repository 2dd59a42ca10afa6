"""A panel of experts to chat with; a selector decides who answers.

  python examples/threecobblers.py                                # three plans of the model in the box
  python examples/threecobblers.py experts.yaml -q "What is 2 + 2?"
  python examples/threecobblers.py experts.yaml --ask_all         # every expert answers, in one batch

The selector scores the experts' names as answers to "which class is this question?" and says how probable
each is. It decides anew for every question, or with --sticky once until /restart. The YAML names experts,
each a model or a layer plan, with descriptions; see `jaxchat.talk.experts.read_panel`.
"""

import contextlib
import sys
from typing import Any

from common import BOX, loader, options_of, parser, run, save, say, write

from jaxchat.talk import Expert, Panel
from jaxchat.talk.experts import read_panel


def box_panel(args: Any) -> Panel:
    """Three experts over the model in the box: as it is, with its last layers again, and without some."""
    load = loader(args)
    options = options_of(args)
    layers = load(BOX).config.num_layers
    plans = {
        "Stories": ("tales about animals, children and magic", None),
        "Greetings": ("hello, thank you, goodbye and small talk", f"0:{layers},{layers - 1}"),
        "Riddles": ("questions, riddles and whatever else", f"0:{layers - 1},{layers - 2}:"),
    }
    experts = [
        Expert(name=name, description=text, model=load(BOX, spec), options=options)
        for name, (text, spec) in plans.items()
    ]
    return Panel(experts, load(BOX), sticky=args.sticky)


def main() -> None:
    """Runs the program."""
    flags = parser(__doc__)
    flags.add_argument("panel", nargs="?", metavar="FILE", help="YAML of experts, e.g. experts.yaml")
    flags.add_argument(
        "-q", "--question", action="append", default=[],
        help='ask this and end; may be given more than once, e.g. -q "Tell me a story."',
    )  # fmt: skip
    flags.add_argument("--sticky", action="store_true", help="the first expert stays, e.g. --sticky")
    flags.add_argument("--ask_all", action="store_true", help="every expert answers, e.g. --ask_all")
    flags.add_argument("--turns", type=int, default=100, help="end after so many questions, e.g. --turns 3")
    args = flags.parse_args()
    panel = read_panel(args.panel, loader(args), options_of(args)) if args.panel else box_panel(args)
    panel.sticky = panel.sticky or args.sticky
    asked: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):
        for question in args.question or typed():
            if question == "/restart":
                panel.restart()
                continue
            asked.append(
                answer_of_all(panel, question, args) if args.ask_all else answer(panel, question, args)
            )
            if len(asked) == args.turns:
                break
    experts = {
        e.name: {"description": e.description, "layer_spec": str(e.model.plan), "system": e.system}
        for e in panel.experts.values()
    }
    save({"program": "threecobblers", "experts": experts, "seed": args.seed, "turns": asked}, args)


def typed() -> Any:
    """Questions from standard input."""
    prompts = sys.stdin.isatty()
    if prompts:
        say("Ask something; /restart forgets, Ctrl-D leaves.")
    while True:
        if prompts:
            print("You  > ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def answer(panel: Panel, question: str, args: Any) -> dict[str, Any]:
    """The chosen expert's answer, as it comes."""
    choice, stream = panel.ask(question)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in choice.probabilities.items())
    say(f"({shares})")
    write(f"{choice.name} > ", args)
    for piece in stream:
        write(piece, args)
    write("\n", args)
    return {"question": question, "expert": choice.name, "probabilities": dict(choice.probabilities),
            "answer": stream.result.text}  # fmt: skip


def answer_of_all(panel: Panel, question: str, args: Any) -> dict[str, Any]:
    """Every expert's answer."""
    answers = {}
    for name, message in panel.ask_all(question):
        write(f"{name} > {message.text}\n", args)
        answers[name] = message.text
    return {"question": question, "answers": answers}


if __name__ == "__main__":
    run(main)
