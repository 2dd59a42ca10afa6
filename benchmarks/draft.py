"""What a draft gives: with and without it, in turn, on the same prompts of a real model.

    python -m benchmarks.draft --model box --draft chimera:box --draft_tree chain:3
    python -m benchmarks.draft --model assistant --draft chimera:DIR --data_path prompts.jsonl --prompts 200

Prompts are what users say first in the conversations of --data_path, or some requests for stories. Prints
tokens a step, the ratio of wall-clock time, and how many texts are the same token by token; the last line is
one JSON object. Which side goes first alternates.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxchat
from jaxchat.chat.replies import Result
from jaxchat.options import GenerateOptions
from jaxchat.pallas.backends import use_32_bits

_THINGS = (
    "dog",
    "cat",
    "boat",
    "queen",
    "train",
    "kite",
    "bee",
    "moon",
    "drum",
    "penguin",
    "frog",
    "hat",
    "lion",
    "cake",
    "duck",
)
_PROMPTS = tuple(
    f"Tell me a story about a {one} and a {other}." for one in _THINGS for other in _THINGS if one != other
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draft", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="box", help="as in jaxchat generate")
    parser.add_argument("--draft", required=True, help="as in jaxchat generate")
    parser.add_argument("--draft_tree", help="as in jaxchat generate")
    parser.add_argument("--quant", help="as in jaxchat generate")
    parser.add_argument("--data_path", type=Path, help="JSON lines with messages, whose first ones are asked")
    parser.add_argument("--prompts", type=int, default=30, help="how many")
    parser.add_argument("--new", type=int, default=150, help="tokens to generate for each, at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    args = parser.parse_args(argv)
    for name in ("prompts", "new"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    return args


def prompts_of(args: argparse.Namespace) -> list[str]:
    """What is asked."""
    if args.data_path is None:
        return list(_PROMPTS[: args.prompts])
    found = []
    for line in args.data_path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line).get("messages", ())
        found += [m["content"] for m in messages if m["role"] == "user"][:1]
        if len(found) == args.prompts:
            break
    return found


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Answers every prompt by both sides."""
    plain = jaxchat.load(args.model, quant=args.quant)
    drafting = jaxchat.load(args.model, quant=args.quant, draft=args.draft, draft_tree=args.draft_tree)
    options = GenerateOptions(max_new_tokens=args.new, temperature=args.temperature, seed=0)
    sides = (plain, drafting)
    for side in sides:
        side.chat("Hello!", options=dataclasses.replace(options, max_new_tokens=16))
    pairs: list[tuple[Result, Result]] = []
    for number, prompt in enumerate(prompts_of(args)):
        order = sides if number % 2 else sides[::-1]
        results = {id(side): side.chat(prompt, options=options) for side in order}
        pairs.append((results[id(plain)], results[id(drafting)]))
    return summary(args, pairs)


def summary(args: argparse.Namespace, pairs: list[tuple[Result, Result]]) -> dict[str, Any]:
    """What all of them say."""
    steps = sum(draft.timings.draft_steps for _, draft in pairs)
    tokens = sum(draft.timings.draft_tokens for _, draft in pairs)
    ratios = [
        draft.timings.decode_rate / plain.timings.decode_rate
        for plain, draft in pairs
        if plain.timings.decode_tokens > 1
    ]
    return {
        "prompts": len(pairs),
        "tokens": sum(len(plain.token_ids) for plain, _ in pairs),
        "tokens_a_step": tokens / steps if steps else None,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "decode_tok_s": statistics.median(plain.timings.decode_rate for plain, _ in pairs),
        "drafting_tok_s": statistics.median(draft.timings.decode_rate for _, draft in pairs),
        "same": sum(plain.token_ids == draft.token_ids for plain, draft in pairs),
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    use_32_bits()
    found = compare(args)
    low, high = found["ratio_range"]
    size = f"{found['prompts']} prompts, {found['tokens']} tokens"
    print(f"work            {size}, temperature {args.temperature}")
    print(f"tokens a step   {found['tokens_a_step']:.2f}")
    print(f"without         {found['decode_tok_s']:.0f} tokens/s")
    print(f"with            {found['drafting_tok_s']:.0f} tokens/s")
    print(f"ratio           {found['ratio']:.2f} ({low:.2f} to {high:.2f})")
    print(f"the same text   {found['same']} of {found['prompts']}")
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(json.dumps(given | found))


if __name__ == "__main__":
    main()
