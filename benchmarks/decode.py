"""Tokens per second of a model shape with random weights, beside the memory bandwidth of the same moment.

    python -m benchmarks.decode --shape tinyllama-1.1b --quant int4:32 --prompt 512 --new 64 --batch 1

Prints a table, and as the last line one JSON object. `--layer_spec` runs another layer plan. `--batch` above
1 also times one sequence alone. `--peer llama.cpp` runs llama.cpp on a random model of the same shape, with
`--gguf Q4_K_M` on the same file, in turn with ours: one side works while the other waits, and which of them
goes first alternates. Ratios are ours over the peer's, the median of neighbours in time.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.llama_cpp import TYPES, Peer, Timing
from jaxchat.analysis import cost
from jaxchat.engine.session import Session
from jaxchat.errors import UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.quant import QuantFormat


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    common.add_model_flags(parser)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate for each sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together")
    parser.add_argument("--layer_spec", default="all", help="layer plan, as in jaxchat.generate")
    parser.add_argument("--bandwidth_mib", type=int, default=1024, help="buffer of the bandwidth measurement")
    parser.add_argument("--peer", choices=("llama.cpp",), help="what to compare with, in the same run")
    parser.add_argument(
        "--peer_python",
        default=sys.executable,
        help="interpreter with llama_cpp, gguf and lazy_loader; default this one",
    )
    args = parser.parse_args(argv)
    for name, least in (("prompt", 1), ("new", 2), ("batch", 1), ("bandwidth_mib", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    return args


def start_peer(args: argparse.Namespace, plan: LayerPlan) -> Peer:
    """A llama.cpp process with a model like the one the flags describe."""
    if plan != LayerPlan.identity(plan.num_layers):
        raise UsageError(f"--peer {args.peer} runs whole models: leave --layer_spec out")
    fmt = QuantFormat.parse(args.quant)
    return Peer(
        args.peer_python,
        common.SHAPES[args.shape],
        args.gguf or TYPES[f"int{fmt.bits}" if fmt else args.dtype],
        threads=common.available_cores(),
        batch=args.batch,
        length=args.prompt + args.new,
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark; the result is the JSON object."""
    plan = LayerPlan.parse(args.layer_spec, common.shape_config(args.shape).num_layers)
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(start_peer(args, plan)) if args.peer else None
        return _measure(args, plan, peer)


def _measure(args: argparse.Namespace, plan: LayerPlan, peer: Peer | None) -> dict[str, Any]:
    engine = common.make_engine(args)
    config = engine.config
    bandwidth = common.ReadBandwidth(args.bandwidth_mib)
    session = engine.session(plan, batch=args.batch)
    prompts = common.random_prompts(config, args.batch, args.prompt)
    _warm_up(session, prompts, args.new)
    alone = engine.session(plan) if args.batch > 1 else None
    if alone is not None:
        _warm_up(alone, prompts[:1], args.new)
    compile_s, temp_bytes = common.compile_decode(session)

    read, prefills, steps, alone_steps = [], [], [], []
    peer_timings: list[Timing] = []

    def time_ours() -> None:
        read.append(bandwidth.gb_s())
        prefills.append(common.prefill_s(session, prompts))
        read.append(bandwidth.gb_s())
        steps.append(common.decode_step_s(session, args.prompt, args.new))
        if alone is not None:
            alone_steps.append(common.decode_step_s(alone, args.prompt, args.new))

    def time_peer() -> None:
        if peer is not None:
            peer_timings.append(peer.time(args.prompt, args.new))

    for repeat in range(common.REPEATS):
        for time_side in (time_ours, time_peer) if repeat % 2 == 0 else (time_peer, time_ours):
            time_side()
    read_gb_s = common.Measured(tuple(read))
    decode = common.Measured(tuple(args.batch / step for step in steps))
    prefill = common.Measured(tuple(args.batch * args.prompt / seconds for seconds in prefills))
    decode_alone = common.Measured(tuple(1 / step for step in alone_steps)) if alone_steps else decode

    weight_bytes = common.weight_bytes_per_step(config, engine.params, plan)
    context = args.prompt + args.new / 2
    kv_bytes = cost.kv_bytes_read(config, plan, context, engine.kv_dtype.name)
    roofline = args.batch * read_gb_s.median * 1e9 / (weight_bytes + args.batch * kv_bytes)
    return {
        **common.model_fields(engine, args),
        "slots": len(plan.executed()),
        "layer_spec": str(plan),
        "prompt": args.prompt,
        "new": args.new,
        "batch": args.batch,
        "decode_tok_s": decode.median,
        "decode_tok_s_range": decode.range,
        "batch_1_decode_tok_s": decode_alone.median,
        "batch_speedup": common.median_ratio(decode, decode_alone),
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
        **(_peer_fields(args, peer, peer_timings, decode, prefill) if peer is not None else {}),
        **common.facts(),
    }


def _warm_up(session: Session, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Compiles the prefill and then, as they may grow the cache, the decode steps."""
    common.prefill_s(session, prompts)
    common.decode_step_s(session, len(prompts[0]), new)


def _peer_fields(
    args: argparse.Namespace,
    peer: Peer,
    timings: Sequence[Timing],
    decode: common.Measured,
    prefill: common.Measured,
) -> dict[str, Any]:
    peer_decode = common.Measured(tuple(args.batch / timing.step_s for timing in timings))
    peer_prefill = common.Measured(tuple(args.batch * args.prompt / timing.prefill_s for timing in timings))
    return {
        "peer": {
            "name": f"{args.peer} (llama-cpp-python)",
            "version": peer.version,
            "build": peer.build,
            "quant": peer.type,
            "threads": peer.threads,
            "decode_tok_s": peer_decode.median,
            "decode_tok_s_range": peer_decode.range,
            "prefill_tok_s": peer_prefill.median,
            "prefill_tok_s_range": peer_prefill.range,
            "load_s": peer.load_s,
            "file_bytes": peer.path.stat().st_size,
        },
        "decode_ratio": common.median_ratio(decode, peer_decode),
        "prefill_ratio": common.median_ratio(prefill, peer_prefill),
    }


def print_report(result: dict[str, Any]) -> None:
    """The result for a person."""
    r = result
    rows = [
        ("model", f"{common.model_line(r)}, {r['slots']} slots"),
        ("work", f"batch {r['batch']}, prompt {r['prompt']}, {r['new']} new tokens"),
        ("decode", _tokens_per_s(r, "decode")),
        ("prefill", _tokens_per_s(r, "prefill")),
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
    ]
    if r["batch"] > 1:
        rows.append(
            (
                "batch 1",
                f"{r['batch_1_decode_tok_s']:.2f} tokens/s; the batch decodes {r['batch_speedup']:.2f} times "
                "as many",
            )
        )
    if "peer" in r:
        peer = r["peer"]
        rows += [
            ("peer", f"{peer['name']} {peer['version']}, {peer['quant']}, {peer['threads']} threads"),
            ("peer decode", f"{_tokens_per_s(peer, 'decode')}; ours is {r['decode_ratio']:.2f} of it"),
            ("peer prefill", f"{_tokens_per_s(peer, 'prefill')}; ours is {r['prefill_ratio']:.2f} of it"),
        ]
    rows.append(("machine", f"{r['cpu']}, {r['cores']} cores; {r['device']}; jax {r['jax']}"))
    common.print_table(rows)


def _tokens_per_s(result: dict[str, Any], what: str) -> str:
    return f"{result[f'{what}_tok_s']:.2f} tokens/s {_range(result[f'{what}_tok_s_range'])}"


def _range(values: Sequence[float]) -> str:
    return f"({min(values):.2f} to {max(values):.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return common.report(lambda: measure(args), print_report)


if __name__ == "__main__":
    sys.exit(main())
