"""What quantization costs: the perplexity of trained models on held-out stories, by format.

    python -m benchmarks.perplexity --model DIR [--model DIR ...] --text stories.txt

Prints a Markdown table; mean nats are over all tokens but the first of each story.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import jaxchat
from jaxchat.errors import JaxchatError
from jaxchat.options import KV_DTYPES

FORMATS = ("none", "int8", "int8:channel", "q8_0", "int4", "int4:64", "int4:32:affine", "q4_0", "q4_1")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.perplexity", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", action="append", required=True, help="model directory; more than once")
    parser.add_argument("--text", required=True, help="UTF-8 file of stories")
    parser.add_argument("--separator", default="<|endoftext|>", help="what stands between two stories")
    parser.add_argument("--first", type=int, default=500, help="number of the first story")
    parser.add_argument("--last", type=int, default=559, help="number of the last story")
    parser.add_argument("--formats", default=",".join(FORMATS), help="as --quant takes them, with commas")
    parser.add_argument("--kernels", default="reference", help="as jaxchat.generate's --kernels")
    parser.add_argument("--kv_dtype", choices=KV_DTYPES, help="of the KV cache")
    return parser.parse_args(argv)


def mean_nats(model: jaxchat.Model, texts: Sequence[str]) -> tuple[float, int]:
    """Mean negative log-likelihood in nats, and the number of tokens; long texts are cut to the context."""
    ids = [model.encode(text)[: model.engine.max_length] for text in texts]
    logprobs = np.concatenate([score.logprobs for score in model.score(token_ids=ids)])
    return -float(logprobs.mean()), logprobs.size


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table and returns the exit code."""
    args = parse_args(argv)
    try:
        texts = _stories(args)
        print("| model | format | weights | nats/token | perplexity | increase |\n|---|---|---|---|---|---|")
        for directory in args.model:
            for row in _rows(directory, texts, args):
                print(f"| {' | '.join(row)} |", flush=True)
    except (JaxchatError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _stories(args: argparse.Namespace) -> list[str]:
    parts = Path(args.text).read_text(encoding="utf-8", errors="replace").split(args.separator)
    texts = [part.strip() for part in parts[args.first : args.last + 1] if part.strip()]
    if not texts:
        raise JaxchatError(
            f"--text {args.text}: {len(parts)} texts between {args.separator!r}, and none of them from "
            f"--first {args.first} to --last {args.last}; give others, such as --first 0"
        )
    return texts


def _rows(directory: str, texts: Sequence[str], args: argparse.Namespace) -> list[list[str]]:
    rows: list[list[str]] = []
    base = None
    for fmt in args.formats.split(","):
        model = jaxchat.load(directory, quant=fmt, kernels=args.kernels, kv_dtype=args.kv_dtype)
        nats, count = mean_nats(model, texts)
        base = nats if base is None else base
        size = sum(value.nbytes for value in model.engine.params.values())
        name = f"{Path(directory).resolve().name}, {count:,} tokens" if not rows else ""
        increase = "" if not rows else f"{100 * np.expm1(nats - base):+.2f} %"
        rows.append([name, fmt, f"{size / 1e3:,.0f} kB", f"{nats:.4f}", f"{np.exp(nats):.3f}", increase])
    return rows


if __name__ == "__main__":
    sys.exit(main())
