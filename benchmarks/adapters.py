"""What an adapter costs a decode step: with and without it, in turn, over one set of random weights.

    python -m benchmarks.adapters --shape tinyllama-1.1b --quant int4:32 --rank 16

The adapter is a random LoRA of every projection. Prints a table, and as the last line one JSON object. The
overhead is that of neighbours in time: each pair times one side right after the other, and which goes first
alternates. `--loaded` puts more adapters of this rank beside it that are not used: what room for them costs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from jaxchat.adapter_use import AdapterUse
from jaxchat.checkpoints.low_rank import Adapter, LowRank
from jaxchat.config import ModelConfig
from jaxchat.engine.adapters import adapter_set
from jaxchat.engine.session import Engine
from jaxchat.families import parameter_table


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adapters", description=__doc__.splitlines()[0]
    )
    common.add_model_flags(parser)
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--loaded", type=int, default=1, help="adapters that are loaded; one is used")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate for each sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together")
    parser.add_argument("--pairs", type=int, default=9, help="measurements of each side")
    args = parser.parse_args(argv)
    for name, least in (("rank", 1), ("loaded", 1), ("prompt", 1), ("new", 2), ("batch", 1), ("pairs", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    return args


def random_adapter(config: ModelConfig, rank: int, seed: int) -> Adapter:
    """A random LoRA of every projection."""
    rng = np.random.default_rng(seed)

    def delta(out: int, inp: int) -> LowRank:
        a, b = (rng.standard_normal(shape, np.float32) * 0.01 for shape in ((rank, inp), (out, rank)))
        return LowRank(a, b, None)

    low_rank = {
        param.name: {layer: delta(*param.layer_shape(config)) for layer in range(config.num_layers)}
        for param in parameter_table(config)
        if param.role == "weight"
    }
    return Adapter(
        name=f"random-{seed}",
        path=Path(f"random-{seed}"),
        replicated=None,
        low_rank=low_rank,
        added={},
        replaced={},
        rows={},
        digest=str(seed),
    )


def with_adapters(engine: Engine, args: argparse.Namespace) -> Engine:
    """The same weights with the adapters that the flags ask for."""
    adapters = [random_adapter(engine.config, args.rank, seed) for seed in range(args.loaded)]
    loaded = adapter_set(
        adapters, engine.config, engine.params, dtype=engine.dtype, placement=engine.placement
    )
    return Engine(
        engine.config,
        engine.params,
        kernels=engine.kernels,
        adapters=loaded,
        uses=(AdapterUse(adapters[0].name),),
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark; the result is the JSON object."""
    plain = common.make_engine(args)
    adapted = with_adapters(plain, args)
    assert adapted.adapters is not None
    prompts = common.random_prompts(plain.config, args.batch, args.prompt)
    sessions = [engine.session(batch=args.batch) for engine in (plain, adapted)]
    for session in sessions:  # compiles
        common.prefill_s(session, prompts)
        common.decode_step_s(session, args.prompt, args.new)
    steps: tuple[list[float], list[float]] = ([], [])
    prefills: tuple[list[float], list[float]] = ([], [])
    for pair in range(args.pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            prefills[side].append(common.prefill_s(sessions[side], prompts))
            steps[side].append(common.decode_step_s(sessions[side], args.prompt, args.new))
    decode = [common.Measured(tuple(times)) for times in steps]
    prefill = [common.Measured(tuple(times)) for times in prefills]
    low_rank = adapted.adapters.stacks.low_rank.values()
    return {
        **common.model_fields(plain, args),
        "rank": args.rank,
        "loaded": args.loaded,
        "columns": adapted.adapters.rank,
        "batch": args.batch,
        "decode_ms": decode[0].median * 1e3,
        "decode_ms_adapter": decode[1].median * 1e3,
        "decode_ratio": common.median_ratio(decode[1], decode[0]),
        "prefill_ms": prefill[0].median * 1e3,
        "prefill_ms_adapter": prefill[1].median * 1e3,
        "prefill_ratio": common.median_ratio(prefill[1], prefill[0]),
        "adapter_mb": sum(factors.a.nbytes + factors.b.nbytes for factors in low_rank) / 1e6,
        "pairs": args.pairs,
        **common.facts(),
    }


def print_report(result: dict[str, Any]) -> None:
    rows = [
        ("machine", f"{result['cpu']}, {result['cores']} cores, {result['device']}"),
        ("model", f"{result['shape']}, {result['quant']}, {result['kernels']} kernels"),
        ("adapters", f"{result['loaded']} of rank {result['rank']}, {result['adapter_mb']:.1f} MB"),
    ]
    for part in ("decode", "prefill"):
        without, with_one = result[f"{part}_ms"], result[f"{part}_ms_adapter"]
        overhead = 100 * (result[f"{part}_ratio"] - 1)
        rows.append((f"{part}, ms", f"{without:.2f} without, {with_one:.2f} with one: {overhead:+.1f} %"))
    common.print_table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return common.report(lambda: measure(args), print_report)


if __name__ == "__main__":
    sys.exit(main())
