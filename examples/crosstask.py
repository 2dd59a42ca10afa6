"""Lets two models talk to each other, or two layer plans over one set of weights.

  python examples/crosstask.py box box "Hello! Who are you?"
  python examples/crosstask.py models/qwen2.5-1.5b models/llama-3-8b "hello!" --reversed_role
  python examples/crosstask.py models/m models/m "hello!" --b_layer_spec 0:20,10: --b temperature=1.1

A says the opening line. Assistants tend to offer each other their help for ever; with --reversed_role A plays
the user, which makes better conversations. A directory that is named twice is loaded once.
"""

import time

from common import loader, options_of, parser, run, save, say, write

from jaxchat.talk import Speaker, Turn, crosstalk


def main() -> None:
    """Runs the program."""
    flags = parser(__doc__)
    flags.add_argument("a", metavar="A", help="the first model's directory; box is the model in the box")
    flags.add_argument("b", metavar="B", help="the second model's directory")
    flags.add_argument("opening", help='what A says first, e.g. "hello!"')
    flags.add_argument("--reversed_role", action="store_true", help="A plays the user, e.g. --reversed_role")
    flags.add_argument("--turns", type=int, default=10, help="end after so many, e.g. --turns 20")
    flags.add_argument(
        "--conversations", type=int, default=1,
        help="so many at once, with seeds from --seed on, decoded as one batch, e.g. --conversations 4",
    )  # fmt: skip
    for who in ("a", "b"):
        side = who.upper()
        flags.add_argument(f"--{who}_layer_spec", metavar="LAYERS", help=f"{side}'s layer plan, e.g. 0:8,4:")
        flags.add_argument(
            f"--{who}_system", metavar="TEXT", help=f"{side}'s system prompt, e.g. 'Be brief.'"
        )
        flags.add_argument(
            f"--{who}", dest=f"{who}_settings", action="append", default=[], metavar="NAME=VALUE",
            help=f"one of {side}'s sampling options, e.g. --{who} temperature=0.2 --{who} top_p=0.9",
        )  # fmt: skip
    args = flags.parse_args()
    settings = {who: options_of(args, vars(args)[f"{who}_settings"], f"--{who}") for who in ("a", "b")}
    load = loader(args)
    a = Speaker(
        name="A",
        model=load(args.a, args.a_layer_spec),
        system=args.a_system,
        reversed_role=args.reversed_role,
        options=settings["a"],
    )
    b = Speaker(name="B", model=load(args.b, args.b_layer_spec), system=args.b_system, options=settings["b"])
    turns: list[Turn] = []
    start = time.perf_counter()
    try:
        for turn in crosstalk(a, b, args.opening, turns=args.turns, conversations=args.conversations):
            turns.append(turn)
            number = f"{turn.conversation + 1} " if args.conversations > 1 else ""
            write(f"{number}{turn.speaker} > {turn.text}\n", args)
            if turn.ends:
                say(f"({number}ends: {turn.ends})")
    except KeyboardInterrupt:
        say("(ends: interrupted)")
    transcript = {
        "program": "crosstask",
        "models": {s.name: {"directory": d, "layer_spec": str(s.model.plan), "system": s.system,
                            "reversed_role": s.reversed_role, "options": vars(s.options)}
                   for s, d in ((a, args.a), (b, args.b))},
        "seed": args.seed,
        "seconds": round(time.perf_counter() - start, 3),
        "turns": [vars(turn) for turn in turns],
    }  # fmt: skip
    save(transcript, args)


if __name__ == "__main__":
    run(main)
