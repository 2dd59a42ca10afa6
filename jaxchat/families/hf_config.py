"""A Hugging Face configuration, read key by key, with errors that name file and key."""

from collections.abc import Mapping
from typing import Any

from jaxchat.errors import JaxchatError, UsageError

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


class HfConfig:
    """A Hugging Face configuration whose errors name the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = values
        self.source = source

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default where it is absent (an explicit null stays None)."""
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; without a default the key must be there."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise JaxchatError(f"{self.source}: key {key!r} is missing; is this the model's own config.json?")
        if isinstance(value, bool) or not isinstance(value, int | float) or int(value) != value:
            raise JaxchatError(f"{self.source}: key {key!r} is {value!r}; expected a whole number")
        return int(value)

    def number(self, key: str, default: float) -> float:
        """A number; null and absent give the default."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise JaxchatError(f"{self.source}: key {key!r} is {value!r}; expected a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; null and absent give the default."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids given as one number or a list."""
        value = self.values.get(key)
        if value is None:
            return ()
        return tuple(int(v) for v in (value if isinstance(value, list) else [value]))

    def activation(self, default: str, *keys: str) -> str:
        """The MLP's activation, from the first of `keys` that is set."""
        name = next((self.values[key] for key in keys if self.values.get(key)), default)
        if name not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UsageError(f"{self.source}: activation {name!r} is not supported; supported: {known}")
        return ACTIVATIONS[name]

    def refuse(self, key: str, *, unless: tuple[Any, ...] = (None, False)) -> None:
        """Refuses a feature this runtime does not have rather than ignore it."""
        if self.values.get(key) not in unless:
            raise UsageError(f"{self.source}: {key}={self.values[key]!r} is not supported")

    def layer_types(self, num_layers: int) -> tuple[str, ...] | None:
        """`layer_types`, checked, or None where the configuration has none."""
        types = self.values.get("layer_types")
        if types is None:
            return None
        known = ("full_attention", "sliding_attention")
        unknown = sorted({str(t) for t in types} - set(known))
        if unknown:
            raise UsageError(f"{self.source}: layer type {unknown[0]!r} is not supported; supported: {known}")
        if len(types) != num_layers:
            raise JaxchatError(f"{self.source}: {len(types)} layer_types for {num_layers} layers")
        return tuple(types)
