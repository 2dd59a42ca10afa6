"""What a sweep over all RYS repeats (i, j) costs, and what sharing the hidden states of prefixes gains.

    python -m benchmarks.sweep --shape qwen2.5-0.5b --sample 12

Scores a random text under the plans 0:j,i:L of a random model, each after the slots it shares with the model,
and from its first slot, in turn. `--sample` measures so many of the plans and scales up by the slots that all
of them run. Prints a table, and as the last line one JSON object.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import common
from jaxchat import analysis
from jaxchat.analysis import sweep
from jaxchat.layer_plan import LayerPlan


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0]
    )
    common.add_model_flags(parser)
    parser.set_defaults(shape="qwen2.5-0.5b")
    parser.add_argument("--tokens", type=int, default=256, help="of the text, read as one window")
    parser.add_argument("--scored", type=int, help="score the last so many of them only; default all")
    parser.add_argument("--sample", type=int, help="measure so many plans of all, both ways; default all")
    parser.add_argument("--bandwidth_mib", type=int, default=1024, help="buffer for the read bandwidth, MiB")
    args = parser.parse_args(argv)
    for name, least in (("tokens", 2), ("scored", 1), ("sample", 1), ("bandwidth_mib", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark; the result is the JSON object."""
    engine = common.make_engine(args)
    layers = engine.config.num_layers
    windows = analysis.cut_windows(common.random_prompts(engine.config, 1, args.tokens)[0], args.tokens)
    scored = min(args.scored or args.tokens - 1, args.tokens - 1)
    windows = windows._replace(scored=np.arange(args.tokens)[None] >= args.tokens - scored)
    compiled = _executables(sweep._outcome)
    started = time.perf_counter()
    base = LayerPlan.identity(layers)
    sweeping = analysis.Sweep(engine, base, windows, max_slots=2 * layers, room=scored)
    sweeping.nats(LayerPlan.identity(layers))
    compile_seconds = time.perf_counter() - started
    return {
        **common.model_fields(engine, args),
        "tokens": args.tokens,
        "scored": scored,
        **measure_plans(sweeping, spread(layers, args.sample)),
        "compilations": _executables(sweep._outcome) - compiled,
        "compile_s": compile_seconds,
        "hidden_state_bytes": sweeping.states.nbytes,
        "weight_bytes": sum(value.nbytes for value in engine.params.values()),
        "read_bandwidth_gb_s": common.ReadBandwidth(args.bandwidth_mib).gb_s(),
        "peak_rss_bytes": common.peak_rss_bytes(),
        **common.facts(),
    }


def measure_plans(sweeping: analysis.Sweep, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Times the plans both ways, in turn, and scales up to all of them."""
    layers = len(sweeping.base)
    base, everything = LayerPlan.identity(layers), analysis.repeats(layers)
    head = common.Measured(tuple(_score(sweeping, base, layers)[0] for _ in range(common.REPEATS)))
    shared: list[float] = []
    whole: list[float] = []
    worst = 0.0
    for number, (i, j) in enumerate(pairs):
        plan = analysis.repeated(base, i, j)
        scores = []
        for times, start in [(shared, j), (whole, 0)][:: 1 if number % 2 else -1]:
            seconds, score = _score(sweeping, plan, start)
            times.append(seconds)
            scores.append(score)
        worst = max(worst, abs(scores[0] - scores[1]) / abs(scores[0]))

    slots, slots_whole = ([slots_run(layers, i, j, start * j) for i, j in everything] for start in (1, 0))
    known, known_whole = ([slots_run(layers, i, j, start * j) for i, j in pairs] for start in (1, 0))
    shared_s = _scaled(shared, head.median, sum(known), len(everything), sum(slots))
    whole_s = _scaled(whole, head.median, sum(known_whole), len(everything), sum(slots_whole))
    return {
        "plans": len(everything),
        "measured_plans": len(pairs),
        "plans_per_s": len(everything) / shared_s,
        "sweep_s": shared_s,
        "plans_per_s_without_sharing": len(everything) / whole_s,
        "sweep_s_without_sharing": whole_s,
        "speedup": whole_s / shared_s,
        "slots": sum(slots),
        "slots_without_sharing": sum(slots_whole),
        "head_ms": head.median * 1e3,
        "median_plan_ms": statistics.median(shared) * 1e3,
        "largest_relative_difference": worst,
    }


def slots_run(layers: int, i: int, j: int, start: int) -> int:
    """How many slots of the plan 0:j,i:L are run from slot `start` on."""
    return j + layers - i - start


def _scaled(times: Sequence[float], head: float, slots: int, plans: int, all_slots: int) -> float:
    """The time of all plans from that of some: each takes the head's, and as much for every slot it runs."""
    if len(times) == plans:
        return sum(times)
    return plans * head + all_slots * (sum(times) - len(times) * head) / slots


def spread(layers: int, sample: int | None) -> list[tuple[int, int]]:
    """All (i, j), or so many of them evenly over all in the order of the slots they run."""
    pairs = analysis.repeats(layers)
    if sample is None or sample >= len(pairs):
        return pairs
    order = sorted(pairs, key=lambda pair: (slots_run(layers, pair[0], pair[1], 0), pair))
    chosen = ((np.arange(sample) + 0.5) * len(pairs) / sample).astype(int)
    return [order[index] for index in chosen]


def _executables(jitted: Any) -> int:
    return jitted._cache_size()


def _score(sweeping: analysis.Sweep, plan: LayerPlan, start: int) -> tuple[float, float]:
    """How long scoring takes from a slot on, and the score."""
    began = time.perf_counter()
    nats = sweeping.nats(plan, start=start)
    return time.perf_counter() - began, float(nats.sum())


def print_report(result: dict[str, Any]) -> None:
    """The result for a person."""
    r = result
    scaled = f", from {r['measured_plans']} measured" if r["measured_plans"] < r["plans"] else ""
    common.print_table(
        [
            ("model", f"{common.model_line(r)}, {r['weight_bytes'] / 1e9:.2f} GB"),
            ("sweep", f"{r['plans']} plans on {r['tokens']} tokens, {r['scored']} of them scored{scaled}"),
            ("speed", f"{r['plans_per_s']:.3g} plans/s, {r['sweep_s']:.1f} s for all"),
            (
                "no sharing",
                f"{r['plans_per_s_without_sharing']:.3g} plans/s, {r['sweep_s_without_sharing']:.1f} s: "
                f"sharing is {r['speedup']:.2f} times as fast",
            ),
            (
                "slots",
                f"{r['slots']} of {r['slots_without_sharing']}; the head takes {r['head_ms']:.1f} ms of the "
                f"median plan's {r['median_plan_ms']:.1f} ms",
            ),
            (
                "agreement",
                f"scores with and without sharing differ by {r['largest_relative_difference']:.1e}",
            ),
            ("compilations", f"{r['compilations']}, in {r['compile_s']:.1f} s with the first pass"),
            (
                "memory",
                f"{r['hidden_state_bytes'] / 2**20:.1f} MiB of hidden states, "
                f"{r['peak_rss_bytes'] / 2**20:.0f} MiB at most in all",
            ),
            ("read bandwidth", f"{r['read_bandwidth_gb_s']:.1f} GB/s"),
            ("machine", f"{r['cpu']}, {r['cores']} cores; {r['device']}; jax {r['jax']}"),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return common.report(lambda: measure(args), print_report)


if __name__ == "__main__":
    sys.exit(main())
