"""LoRA training beside PEFT: the same weights, factors and batches, a step of each side in turn.

    python -m benchmarks.training --shape smollm2-135m --rank 16 --batch 4 --length 256 --steps 50

The peer is transformers and PEFT on torch, in a child process (`peft_peer.py`) that waits meanwhile; both
compute in float32. Prints tokens per second, their ratio, and by how much the losses differ; the last line is
one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from benchmarks import common
from jaxchat.families import parameter_table
from jaxchat.pallas.backends import use_32_bits
from jaxchat.training import lora
from jaxchat.training.batches import Batch
from jaxchat.training.parts import LowRank
from jaxchat.training.tasks import Text
from jaxchat.training.trainer import Report, Settings, Trainer

ALPHA = 32.0
RATE = 2e-4


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shape", choices=sorted(common.SHAPES), default="smollm2-135m", help="of the model")
    parser.add_argument("--rank", type=int, default=16, help="of the deltas of every projection")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--steps", type=int, default=20, help="steps of each side; the first is not timed")
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter with torch and peft")
    args = parser.parse_args(argv)
    for name, least in (("rank", 1), ("batch", 1), ("length", 2), ("steps", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    return args


class Batches:
    """Random texts, learnt whole."""

    def __init__(self, args: argparse.Namespace, vocabulary: int):
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, vocabulary, (args.steps, args.batch, args.length)).astype(np.int32)

    def epoch(self, number: int) -> list[Batch]:
        """See `training.trainer.Data`."""
        ones, zeros = np.ones_like(self.tokens[0], np.float32), np.zeros_like(self.tokens[0])
        return [Batch(tokens, ones, zeros, ()) for tokens in self.tokens]


class Peer:
    """PEFT in its own process, which does a step when it is asked."""

    def __init__(self, args: argparse.Namespace, directory: Path):
        script = os.path.join(os.path.dirname(__file__), "peft_peer.py")
        given = json.dumps({"rank": args.rank, "alpha": ALPHA, "learning_rate": RATE})
        self._process = subprocess.Popen(
            [args.peer_python, script, os.fspath(directory), given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self._answer()["version"]

    def step(self, number: int) -> tuple[float, float]:
        """Loss and seconds of one step."""
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        answer = self._answer()
        return answer["loss"], answer["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("the peer ended; its messages are above")

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Trains both sides and returns what came out."""
    config = common.shape_config(args.shape)
    params = common.random_params(config, "float32")
    initial = lora.initial(config, lora.targets_of(config, "all"), args.rank, jax.random.key(0))
    data = Batches(args, config.vocab_size)
    table = {param.name: param for param in parameter_table(config)}
    weights = {
        param.hf.format(layer): np.asarray(
            params[param.name][layer] if param.per_layer else params[param.name]
        )
        for param in table.values()
        for layer in range(config.num_layers if param.per_layer else 1)
    }
    factors = {
        table[name].hf.format(layer).removesuffix(".weight"): np.ascontiguousarray(own.a[layer])
        for name, own in initial.items()
        for layer in range(config.num_layers)
    }
    (directory / "config.json").write_text(json.dumps(common.SHAPES[args.shape]))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(factors, directory / "factors.safetensors")
    np.save(directory / "tokens.npy", data.tokens)
    trainer = Trainer(
        Text(config, jnp.dtype(jnp.float32), LowRank(ALPHA / args.rank)),
        frozen=params,
        initial=initial,
        decayed=jax.tree.map(lambda _: True, initial),
        data=data,
        held_out=None,
        settings=Settings(
            max_steps=args.steps, learning_rate=RATE, schedule="constant", save_steps=sys.maxsize
        ),
        directory=directory,
        identity={},
    )
    peer = Peer(args, directory)
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    begun = time.perf_counter()

    def report(now: Report) -> None:
        nonlocal begun
        ours.append((now.loss, time.perf_counter() - begun))
        theirs.append(peer.step(now.step - 1))
        begun = time.perf_counter()

    trainer.run(report)
    trainer.close()
    peer.close()
    return summary(args, ours, theirs) | {"peer": peer.version}


def summary(
    args: argparse.Namespace, ours: list[tuple[float, float]], theirs: list[tuple[float, float]]
) -> dict[str, Any]:
    """Medians over the steps but the first, and the largest difference of losses."""
    tokens = args.batch * args.length
    speeds = [[tokens / seconds for _, seconds in side[1:]] for side in (ours, theirs)]
    ratios = [one / other for one, other in zip(*speeds, strict=True)]
    apart = [abs(one - other) for (one, _), (other, _) in zip(ours, theirs, strict=True)]
    return {
        "tokens_per_second": statistics.median(speeds[0]),
        "peer_tokens_per_second": statistics.median(speeds[1]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "largest_loss_difference": max(apart),
        "last_loss": ours[-1][0],
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    use_32_bits()
    with tempfile.TemporaryDirectory() as directory:
        found = compare(args, Path(directory))
    low, high = found["ratio_range"]
    print(
        f"work            LoRA of rank {args.rank}, {args.shape}, {args.batch} x {args.length} tokens a step"
    )
    print(f"jaxchat         {found['tokens_per_second']:.0f} tokens/s")
    print(f"{found['peer']:<15} {found['peer_tokens_per_second']:.0f} tokens/s")
    print(f"ratio           {found['ratio']:.2f} ({low:.2f} to {high:.2f})")
    print(f"losses          differ by at most {found['largest_loss_difference']:.1e} in {args.steps} steps")
    print(json.dumps(vars(args) | found))


if __name__ == "__main__":
    main()
