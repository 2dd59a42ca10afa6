"""Tokens per second of a model shape with random weights, beside the memory bandwidth of the same moment.

    python -m benchmarks.decode --shape tinyllama-1.1b --dtype bfloat16 --prompt 512 --new 64 --batch 1

Prints a table, and as the last line one JSON object. `--layer_spec` runs another layer plan.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from jaxchat.engine import Engine
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.layer_plan import LayerPlan


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", choices=sorted(common.SHAPES), default="tinyllama-1.1b", help="of the model"
    )
    parser.add_argument("--dtype", choices=sorted(common.DTYPES), default="bfloat16", help="of the weights")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate for each sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together")
    parser.add_argument("--layer_spec", default="all", help="layer plan, as in jaxchat.generate")
    parser.add_argument("--bandwidth_mib", type=int, default=1024, help="buffer of the bandwidth measurement")
    args = parser.parse_args(argv)
    for name, least in (("prompt", 1), ("new", 2), ("batch", 1), ("bandwidth_mib", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark; the result is the JSON object."""
    config = common.shape_config(args.shape)
    plan = LayerPlan.parse(args.layer_spec, config.num_layers)
    bandwidth = common.ReadBandwidth(args.bandwidth_mib)
    engine = Engine(config, common.random_params(config, args.dtype))
    session = engine.session(plan, batch=args.batch)
    prompts = common.random_prompts(config, args.batch, args.prompt)
    common.prefill_s(session, prompts)  # compiles, and so do the first steps, after growing the cache
    common.decode_step_s(session, args.prompt, args.new)
    compile_s, temp_bytes = common.compile_decode(session)

    read, prefills, steps = [], [], []
    for _ in range(common.REPEATS):
        read.append(bandwidth.gb_s())
        prefills.append(common.prefill_s(session, prompts))
        read.append(bandwidth.gb_s())
        steps.append(common.decode_step_s(session, args.prompt, args.new))
    read_gb_s = common.Measured(tuple(read))
    decode = common.Measured(tuple(args.batch / step for step in steps))
    prefill = common.Measured(tuple(args.batch * args.prompt / seconds for seconds in prefills))

    weight_bytes = common.weight_bytes_per_step(config, engine.params, plan)
    context = args.prompt + args.new / 2
    kv_bytes = common.kv_bytes_per_step(config, plan, context, engine.dtype.itemsize)
    roofline = args.batch * read_gb_s.median * 1e9 / (weight_bytes + args.batch * kv_bytes)
    return {
        "shape": args.shape,
        "dtype": args.dtype,
        "activations": engine.dtype.name,
        "layers": config.num_layers,
        "slots": len(plan.executed()),
        "layer_spec": str(plan),
        "prompt": args.prompt,
        "new": args.new,
        "batch": args.batch,
        "decode_tok_s": decode.median,
        "decode_tok_s_range": decode.range,
        "prefill_tok_s": prefill.median,
        "prefill_tok_s_range": prefill.range,
        "weight_bytes_per_token": weight_bytes,
        "kv_bytes_per_token": kv_bytes,
        "read_bandwidth_gb_s": read_gb_s.median,
        "read_bandwidth_range": read_gb_s.range,
        "roofline_tok_s": roofline,
        "roofline_fraction": decode.median / roofline,
        "temp_bytes": temp_bytes,
        "compile_s": compile_s,
        "peak_rss_bytes": common.peak_rss_bytes(),
        **common.facts(),
    }


def print_report(result: dict[str, Any]) -> None:
    """The result for a person."""
    r = result
    common.print_table(
        [
            ("model", f"{r['shape']}, {r['dtype']}, {r['slots']} slots over {r['layers']} layers"),
            ("work", f"batch {r['batch']}, prompt {r['prompt']}, {r['new']} new tokens"),
            ("decode", f"{r['decode_tok_s']:.2f} tokens/s {_range(r['decode_tok_s_range'])}"),
            ("prefill", f"{r['prefill_tok_s']:.1f} tokens/s {_range(r['prefill_tok_s_range'])}"),
            (
                "bytes per step",
                f"{r['weight_bytes_per_token'] / 1e6:.1f} MB weights + "
                f"{r['kv_bytes_per_token'] / 1e6:.1f} MB KV a sequence",
            ),
            (
                "read bandwidth",
                f"{r['read_bandwidth_gb_s']:.1f} GB/s {_range(r['read_bandwidth_range'])}",
            ),
            ("roofline", f"{r['roofline_tok_s']:.2f} tokens/s; decode reaches {r['roofline_fraction']:.0%}"),
            (
                "decode step",
                f"{r['temp_bytes'] / 1e6:.1f} MB temporaries, compiles in {r['compile_s']:.1f} s",
            ),
            ("peak memory", f"{r['peak_rss_bytes'] / 1e9:.2f} GB (with the bandwidth buffer)"),
            ("machine", f"{r['cpu']}, {r['cores']} cores; {r['device']}; jax {r['jax']}"),
        ]
    )


def _range(values: Sequence[float]) -> str:
    return f"({min(values):.2f} to {max(values):.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        result = measure(args)
    except (UsageError, JaxchatError) as error:
        print(error, file=sys.stderr)
        return 2
    print_report(result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
