"""The methods of quantization that are read, a row each, and what a repository says of the one it has."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxchat.checkpoints.hf_quant import (
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gptq,
    hqq,
    mxfp4,
)
from jaxchat.checkpoints.hf_quant.weight import Found, Method, Weight
from jaxchat.families.hf_config import HfConfig

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        gptq.METHOD,
        awq.METHOD,
        compressed_tensors.METHOD,
        *fp8.METHODS,
        bitsandbytes.METHOD,
        mxfp4.METHOD,
        hqq.METHOD,
    )
}

OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where older repositories have what others say in `config.json`, and the method that this is."""


@dataclasses.dataclass(frozen=True)
class Stated:
    """What a repository says of its quantization.

    Attributes:
      method: a row of `METHODS`.
      settings: the section of the configuration.
    """

    method: Method
    settings: HfConfig

    @functools.cached_property
    def reader(self) -> Callable[[Found], Weight]:
        """What makes a `Weight` of a layer."""
        return self.method.reader(self.settings)

    @property
    def label(self) -> str:
        """What to call the model."""
        return self.method.label(self.settings)


def stated(method: str, values: Mapping[str, Any], where: str) -> Stated | None:
    """What a section of a configuration says; None of a method that is not read.

    Raises:
      JaxchatError: a setting is not known, or not read.
    """
    if method not in METHODS:
        return None
    found = Stated(METHODS[method], HfConfig(values, where))
    _ = found.reader, found.label  # refuses what it does not know
    return found
