"""FP8 of model makers (`fp8`, as of DeepSeek), with a scale for blocks, and of FBGEMM, with one for rows."""

from collections.abc import Callable

from jaxchat.checkpoints.hf_quant.floats import Float8Weight, block_of
from jaxchat.checkpoints.hf_quant.weight import Found, Method, Weight
from jaxchat.families.hf_config import HfConfig

_SCALES = ("weight_scale_inv", "weight_scale")
"""What the scales are called; despite the name of the first, both are to be multiplied with."""


def reader(settings: HfConfig) -> Callable[[Found], Weight]:
    """See `Method`."""
    block = block_of(settings.values.get("weight_block_size"), settings.at("weight_block_size"))

    def weight(found: Found) -> Weight:
        scale = next((name for name in _SCALES if name in found.tensors), _SCALES[0])
        return Float8Weight(found, scale, block)

    return weight


METHODS = tuple(
    Method(
        name=name,
        marks=_SCALES,
        reader=reader,
        label=lambda settings, label=label: label,  # type: ignore[misc]
        ignored=("input_scale", "activation_scale", "activation_scale_inv", "input_scale_ub"),
    )
    for name, label in (("fp8", "fp8"), ("fbgemm_fp8", "fp8 (fbgemm)"))
)
