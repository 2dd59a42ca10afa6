"""What a decode step costs under a layer plan: bytes that must move, operations, and the speed they allow.

Arithmetic on configurations and plans; no weights, no JAX. Times measured are in `benchmarks/`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from jaxchat.config import ModelConfig, Param
from jaxchat.errors import UsageError
from jaxchat.families import parameter_table
from jaxchat.layer_plan import LayerPlan

_BANDWIDTH = re.compile(r"([0-9]*\.?[0-9]+)\s*(?:([GT])B/s)?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device and the bytes a second it reads from its memory."""

    name: str
    bandwidth: float


DEVICES = {
    device.name: device
    for device in (
        # Data sheets of NVIDIA: A100 80GB SXM, H100 SXM, H200 SXM, B200 (HGX, each), L40S, GeForce.
        Device("a100", 2.039e12),
        Device("h100", 3.35e12),
        Device("h200", 4.8e12),
        Device("b200", 8.0e12),
        Device("l40s", 0.864e12),
        Device("rtx3090", 0.936e12),
        Device("rtx4090", 1.008e12),
        Device("rtx5090", 1.792e12),
        # `pltpu.get_tpu_info_for_chip` of JAX 0.10.2; v5p: cloud.google.com/tpu/docs/v5p. A tpu7x chip shows
        # as two devices and has 7.4 TB/s for both.
        Device("v5e", 0.82e12),
        Device("v5p", 2.765e12),
        Device("v6e", 1.64e12),
        Device("tpu7x", 3.7e12),
    )
}
"""Peak bandwidths; what runs reaches 60 to 90 % of them."""


def device(text: str) -> Device:
    """A device by name, or by bandwidth: `h200`, `61.4 GB/s`, `1.2TB/s`; a bare number is GB/s.

    Raises:
      UsageError: it is neither.
    """
    if text.lower() in DEVICES:
        return DEVICES[text.lower()]
    found = _BANDWIDTH.fullmatch(text.strip())
    bandwidth = float(found[1]) * (1e12 if (found[2] or "").upper() == "T" else 1e9) if found else 0.0
    if not 0 < bandwidth < math.inf:
        raise UsageError(
            f"no device is called {text!r}; choose one of {', '.join(DEVICES)}, or give its memory "
            "bandwidth, e.g. '61.4 GB/s'"
        )
    return Device(f"{bandwidth / 1e9:g} GB/s", bandwidth)


def weight_bytes_read(config: ModelConfig, plan: LayerPlan, nbytes: Mapping[str, int]) -> int:
    """Bytes of weights that one decode step must read: the plan's layers, final norm and head.

    A layer counts as often as it runs; a half of a slot that is scaled by 0 is not read, nor is the embedding
    beyond a row a sequence. A batch shares the step: these bytes serve one token of each sequence.

    Args:
      config: the model.
      plan: what runs.
      nbytes: the bytes of each parameter, of those that are per layer for one layer.
    """
    return sum(nbytes[param.name] * count for param, count in _times_read(config, plan))


def kv_row_bytes(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes of the keys and values of one token in one slot; of `int8` the scale of each head's row too."""
    per_head = {"float32": 4 * config.head_dim, "bfloat16": 2 * config.head_dim, "int8": config.head_dim + 4}
    return 2 * config.num_kv_heads * per_head[kv_dtype]


def kv_bytes_read(config: ModelConfig, plan: LayerPlan, context: float, kv_dtype: str) -> int:
    """Bytes of keys and values that one sequence's attention reads in a decode step at a context length."""
    return round(kv_row_bytes(config, kv_dtype) * _rows_attended(config, plan, context))


def flops_per_token(config: ModelConfig, plan: LayerPlan, context: float) -> int:
    """Floating-point operations of one decode step at a context length: two for a multiply and an add.

    Matrix products and attention; norms, softmax, rotations and activations are left out (below 1 %).
    """
    products = sum(
        2 * math.prod(param.layer_shape(config)) * count
        for param, count in _times_read(config, plan)
        if param.quantizable
    )
    return products + round(4 * config.num_heads * config.head_dim * _rows_attended(config, plan, context))


def _times_read(config: ModelConfig, plan: LayerPlan) -> Iterator[tuple[Param, int]]:
    """How often a decode step uses each parameter as a whole."""
    slots = plan.executed()
    for param in parameter_table(config):
        if param.half is not None:
            yield param, sum(slot.scale_of(param.half) != 0 for slot in slots)
        elif param.role == "embedding":
            yield param, int(config.tied_embeddings)
        else:
            yield param, int(param.role != "positions")


def _rows_attended(config: ModelConfig, plan: LayerPlan, context: float) -> float:
    windows = [config.layer_windows[slot.layer] for slot in plan.executed() if slot.attn_scale != 0]
    return sum(min(context, window) if window else context for window in windows)
