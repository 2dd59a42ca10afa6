"""A Hugging Face configuration, read key by key and type by type, with errors that name file and key."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from jaxchat.config import MAX_LAYERS
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.typed import INT32, Count, Finite, checked
from jaxchat.visible import shown

T = TypeVar("T")

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}
"""Hugging Face activation name -> ours."""


Positive = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
"""A finite number above 0."""


class HfConfig:
    """A Hugging Face configuration, or a part of one, whose errors name the file and the key.

    Explicit nulls are absent keys, but where it is said.
    """

    def __init__(self, values: Mapping[str, Any], source: str):
        """Args: values: what the file says. source: the file, and the key of the part."""
        self.values = values
        self.source = source

    def has(self, key: str) -> bool:
        """Whether there is the key, if only with null."""
        return key in self.values

    def read(self, key: str, kind: type[T], default: T) -> T:
        """The value of a key, of a type as `typed.checked` takes it."""
        value = self.values.get(key)
        if value is None:
            return default
        return checked(value, kind, where=self.at(key), advice=_ADVICE)

    def at(self, key: str) -> str:
        """Names a key in messages."""
        return f"{self.source}{'.' if ': ' in self.source else ': '}{key}"

    def integer(
        self, key: str, default: int | None = None, *, at_least: int = 0, at_most: int = INT32
    ) -> int:
        """A whole number, which may be written as 4.0; without a default the key must be there."""
        value = self.values.get(key)
        if value is None and default is None:
            raise JaxchatError(f"{self.at(key)} is missing; is this the model's own config.json?")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        found = checked(default if value is None else value, Count, where=self.at(key), advice=_ADVICE)
        if not at_least <= found <= at_most:
            limit = f"at least {at_least}" if found < at_least else f"at most {at_most}"
            raise JaxchatError(f"{self.at(key)} is {found}; it must be {limit}")
        return found

    def length(self, key: str, default: int) -> int:
        """A number of tokens from 1 on; what no int32 holds is as good as the longest that one does."""
        value = self.values.get(key)
        if isinstance(value, int | float) and value > INT32 and value != math.inf:
            return INT32
        return self.integer(key, default, at_least=1)

    def layers(self, key: str) -> int:
        """The number of layers, not so high that it cannot be one."""
        return self.integer(key, at_least=1, at_most=MAX_LAYERS)

    def window(self, default: int | None) -> int | None:
        """`sliding_window` in tokens; here null is none, and only an absent key the default."""
        return self.integer("sliding_window", 0) or None if self.has("sliding_window") else default

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        return float(self.read(key, Finite, default))

    def positive(self, key: str, default: float) -> float:
        """A finite number above 0."""
        return float(self.read(key, Positive, default))

    def nonnegative(self, key: str, default: float) -> float:
        """A finite number from 0 on."""
        return float(self.read(key, _NonNegative, default))

    def flag(self, key: str, default: bool) -> bool:
        """True or false, also written as 1 or 0; nothing else counts as one of them."""
        value = self.values.get(key)
        return bool(value) if type(value) is int and value in (0, 1) else self.read(key, bool, default)

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids given as one number or a list; below 0 is none."""
        found = self.values.get(key)
        ids = self.read(key, list[_Id], []) if isinstance(found, list) else [self.read(key, _Id, -1)]
        return tuple(i for i in ids if i >= 0)

    def section(self, key: str) -> "HfConfig | None":
        """The part of it that is under a key."""
        found = self.read(key, dict[str, Any], {})
        return HfConfig(found, self.at(key)) if found else None

    def activation(self, default: str, *keys: str) -> str:
        """The MLP's activation, from the first of `keys` that is set."""
        key = next((key for key in keys if self.values.get(key) is not None), keys[0])
        name = self.read(key, str, default)
        if name not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UsageError(f"{self.at(key)}: activation {shown(name)} is not supported; supported: {known}")
        return ACTIVATIONS[name]

    def refuse(self, key: str) -> None:
        """Refuses a feature this runtime does not have rather than ignore it."""
        if self.values.get(key) not in (None, False):
            raise UsageError(f"{self.at(key)} is {shown(self.values[key])}, which is not supported")

    def layer_types(self, num_layers: int) -> tuple[str, ...] | None:
        """`layer_types`, checked, or None where the configuration has none."""
        types = self.read("layer_types", list[str], [])
        if self.values.get("layer_types") is None:
            return None
        known = ("full_attention", "sliding_attention")
        for unknown in sorted(set(types) - set(known)):
            raise UsageError(
                f"{self.at('layer_types')}: {shown(unknown)} is not supported; supported: {', '.join(known)}"
            )
        if len(types) != num_layers:
            raise JaxchatError(
                f"{self.at('layer_types')} are {len(types)}; expected {num_layers}, one a layer"
            )
        return tuple(types)


_ADVICE = "download the file again"
_NonNegative = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
_Id = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
