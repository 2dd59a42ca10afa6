"""The keys of a GGUF model, read type by type, and which of them change a model that does not know them.

What they mean for an architecture is in `gguf.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.typed import INT32, Count, Finite, checked
from jaxchat.visible import shown

ADVICE = "take another file of the model, or convert it again"
"""What to do about a file that is not as it should be."""


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds, as far as a configuration needs it.

    Attributes:
      metadata: its keys and values.
      shapes: the shape of each tensor, the slowest dimension first.
      values: the numbers of a tensor by its name; of small ones only is it asked.
      where: names the file in messages.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    values: Callable[[str], np.ndarray]
    where: str


class Keys:
    """The keys of an architecture, read type by type; errors name the file and the key."""

    def __init__(self, model: GgufModel):
        self.model, self.prefix = model, str(model.metadata.get("general.architecture"))
        self._read: set[str] = set()

    def at(self, key: str) -> str:
        """Names a key in messages."""
        return f"{self.model.where}: {self.prefix}.{key}"

    def get(self, key: str) -> Any:
        """The value as it is; None where there is none."""
        self._read.add(key)
        return self.model.metadata.get(f"{self.prefix}.{key}")

    def _uniform(self, key: str) -> Any:
        """A value; of a list with one for each layer the one that all have."""
        found = self.get(key)
        if not isinstance(found, list):
            return found
        if any(other != found[0] for other in found) or not found:
            raise UsageError(
                f"{self.at(key)} is {shown(found)}: layers that differ in it are not supported for this "
                "architecture"
            )
        return found[0]

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = INT32) -> int:
        """A whole number; without a default the key must be there."""
        found = self._uniform(key)
        if found is None:
            if default is not None:
                return default
            vocabulary = "" if self.model.shapes else " (the file has no tensors: a vocabulary?)"
            raise JaxchatError(f"{self.at(key)} is missing{vocabulary}; {ADVICE}")
        found = checked(found, Count, where=self.at(key), advice=ADVICE)
        if not low <= found <= high:
            raise JaxchatError(f"{self.at(key)} is {found}; expected {low} to {high}; {ADVICE}")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, with no more digits than its float32 has: 1e-05, and not 9.99999974e-06."""
        found = self._uniform(key)
        if found is None and default is not None:
            return default
        if found is None:
            raise JaxchatError(f"{self.at(key)} is missing; {ADVICE}")
        value = float(checked(found, Finite, where=self.at(key), advice=ADVICE))
        return float(str(np.float32(value))) if float(np.float32(value)) == value else value

    def text(self, key: str, default: str) -> str:
        """A text."""
        found = self.get(key)
        return default if found is None else checked(found, str, where=self.at(key), advice=ADVICE)

    def refuse_others(self) -> None:
        """Refuses what would change the model and was not read: see `NEUTRAL`."""
        for key, neutral in NEUTRAL.items():
            found = self.model.metadata.get(f"{self.prefix}.{key}")
            if key not in self._read and found is not None and found not in neutral:
                raise UsageError(
                    f"{self.at(key)} is {shown(found)}, which is not supported for this architecture"
                )


_OFF = (0, False)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_count": _OFF,
    "attention.scale": _OFF,
    "attention.output_scale": (0, 1),
    "attention.temperature_scale": _OFF,
    "attention.clamp_kqv": _OFF,
    "attention.max_alibi_bias": _OFF,
    "attention.causal": (True,),
    "attention.shared_kv_layers": _OFF,
    "attention.key_length_swa": (),
    "attention.value_length_swa": (),
    "attention.q_lora_rank": _OFF,
    "attention.kv_lora_rank": _OFF,
    "attn_logit_softcapping": _OFF,
    "final_logit_softcapping": _OFF,
    "router_logit_softcapping": _OFF,
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "embedding_length_per_layer_input": _OFF,
    "pooling_type": _OFF,
    "use_parallel_residual": _OFF,
    "nextn_predict_layers": _OFF,
    "rope.dimension_sections": ([0, 0, 0, 0], []),
    "rope.freq_base_swa": (),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": _OFF,
    "rope.scaling.alpha": _OFF,
    "rope.scaling.attn_factor": (0, 1),
    "ssm.inner_size": _OFF,
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Keys that change a model -> the values with which they do not. An architecture may read them itself."""
