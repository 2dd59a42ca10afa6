"""What one token costs under a layer plan: bytes read, operations, and the speed that a memory allows.

The counting is `cost.py`'s. JAX is imported only where there is a quantization to count.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from jaxchat.analysis import cost, show
from jaxchat.checkpoints.manifest import WEIGHT_DTYPES, Manifest
from jaxchat.config import ModelConfig, Param
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one token of a batch of one costs.

    Attributes:
      weight_format: of the weights, a dtype or a quantization.
      kv_dtype: of the KV cache.
      context: tokens in the context; the other figures are for an empty one and for this one.
      weight_bytes: read, each layer as often as it runs.
      kv_bytes: keys and values read.
      flops: floating-point operations.
      tokens_per_second: on each device, if reading these bytes is all that takes time.
    """

    weight_format: str
    kv_dtype: str
    context: int
    weight_bytes: int
    kv_bytes: tuple[int, int]
    flops: tuple[int, int]
    tokens_per_second: dict[str, tuple[float, float]]


def token_cost(
    config: ModelConfig,
    plan: LayerPlan,
    devices: Sequence[cost.Device],
    report: show.Report,
    *,
    dtype: str | None = None,
    quant: str | None = None,
    kv_dtype: str | None = None,
    manifest: Manifest | None = None,
) -> Cost:
    """What one token costs under a plan.

    Args:
      config: the model.
      plan: what runs.
      devices: to predict a speed for.
      report: of the model under the plan: its context and how its weights are stored.
      dtype, quant: of the weights, instead of as stored; bfloat16 if nothing says how they are.
      kv_dtype: of the KV cache; None is float32 beside float32 weights, else bfloat16, as on an accelerator.
      manifest: of a checkpoint: how its parameters are quantized, if it says so.
    """
    weight_format = quant or dtype or report.quantization or report.stored_dtype or "bfloat16"
    stored = None if quant or dtype or manifest is None else manifest.quantization
    if stored is not None and manifest is not None:
        bytes_of = _stored_layer_bytes(config, manifest)
    else:
        bytes_of = _layer_bytes(config, weight_format)
    sizes = {param.name: bytes_of(param) for param in parameter_table(config)}
    weight_bytes = cost.weight_bytes_read(config, plan, sizes)
    kv_dtype = kv_dtype or ("float32" if weight_format == "float32" else "bfloat16")
    contexts = (0, report.max_length)
    kv_bytes = [cost.kv_bytes_read(config, plan, n, kv_dtype) for n in contexts]
    return Cost(
        weight_format=weight_format,
        kv_dtype=kv_dtype,
        context=report.max_length,
        weight_bytes=weight_bytes,
        kv_bytes=(kv_bytes[0], kv_bytes[1]),
        flops=(cost.flops_per_token(config, plan, 0), cost.flops_per_token(config, plan, contexts[1])),
        tokens_per_second={
            device.name: (
                device.bandwidth / (weight_bytes + kv_bytes[0]),
                device.bandwidth / (weight_bytes + kv_bytes[1]),
            )
            for device in devices
        },
    )


def _stored_layer_bytes(config: ModelConfig, manifest: Manifest) -> Callable[[Param], int]:
    """The same as a checkpoint holds them; where layers differ, their mean."""
    # Imports JAX, half a second that plain dtypes do not need.
    from jaxchat.checkpoints.quantized import stored_bytes, stored_format_of

    def bytes_of(param: Param) -> int:
        storage = stored_format_of(manifest, param) or WEIGHT_DTYPES[manifest.dtypes[param.name]]
        return stored_bytes(param.stacked_shape(config), storage) // param.rows(config)

    return bytes_of


def _layer_bytes(config: ModelConfig, weight_format: str) -> Callable[[Param], int]:
    """The bytes of a parameter in a format, of one that is per layer in one layer."""
    if weight_format in WEIGHT_DTYPES:
        itemsize = WEIGHT_DTYPES[weight_format].itemsize
        return lambda param: math.prod(param.layer_shape(config)) * itemsize
    # Imports JAX, half a second that plain dtypes do not need.
    from jaxchat.checkpoints.quantized import stored_bytes
    from jaxchat.quant import QuantFormat, format_for

    fmt, plain = QuantFormat.parse(weight_format), WEIGHT_DTYPES["bfloat16"]
    return lambda param: stored_bytes(param.layer_shape(config), format_for(param, fmt) or plain)


def cost_lines(token: Cost) -> Iterator[str]:
    """The cost for people."""
    at = f"at {token.context:,} tokens"
    weights, kv = show.short_bytes(token.weight_bytes), show.short_bytes(token.kv_bytes[1])
    yield f"{'a token':<12}reads {weights} of {token.weight_format} weights"
    yield f"{'':<12}and {kv} of {token.kv_dtype} KV {at}"
    flops = [f"{count / 1e9:,.3g}" for count in token.flops]
    yield f"{'':<12}takes {flops[0]} GFLOP with an empty context, {flops[1]} {at}"
    for name, (empty, full) in token.tokens_per_second.items():
        yield f"{name:<12}at most {empty:,.1f} tokens/s with an empty context, {full:,.1f} {at}"
