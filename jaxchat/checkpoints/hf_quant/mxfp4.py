"""MXFP4 as gpt-oss has it: blocks of 32 codes with a power of two."""

from collections.abc import Callable

from jaxchat.checkpoints.hf_quant.floats import MX_GROUP, MxFloat4Weight, whole_groups
from jaxchat.checkpoints.hf_quant.weight import Found, Method, Weight
from jaxchat.families.hf_config import HfConfig


def reader(settings: HfConfig) -> Callable[[Found], Weight]:
    """See `Method`."""

    def weight(found: Found) -> Weight:
        whole_groups(found, MX_GROUP)
        return MxFloat4Weight(found, "weight_blocks", "weight_scales", blocks=True)

    return weight


METHOD = Method(
    name="mxfp4",
    marks=("weight_blocks", "weight_scales"),
    reader=reader,
    label=lambda settings: "mxfp4",
)
