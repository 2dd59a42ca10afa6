"""`adapter_config.json`: what PEFT writes of a LoRA adapter, read and checked; which modules it is for.

Source: peft/tuners/lora/config.py and peft/tuners/tuners_utils.py of PEFT 0.21. Its tensors: `adapter.py`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from jaxchat.checkpoints.patterns import PLAIN, matches
from jaxchat.config import MAX_LAYERS
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.files import read_json
from jaxchat.typed import Count, Finite, checked
from jaxchat.visible import shown

CONFIG = "adapter_config.json"

Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Names = list[str] | str | None
_Range = Annotated[list[Count], msgspec.Meta(min_length=2, max_length=2)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What counts of an `adapter_config.json`; names and defaults are PEFT's.

    Attributes:
      enable_lora: which parts of a fused projection have a delta, as PEFT 0.2 wrote them (`MergedLinear`).
    """

    peft_type: str = "LORA"
    r: Rank = 8
    lora_alpha: Finite = 8
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Finite] | None = None
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: list[Count] | Count | None = None
    layers_pattern: Names = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[Count] | dict[str, list[Count]] | None = None
    layer_replication: list[_Range] | None = None
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    enable_lora: list[bool] | None = None
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str | None = True
    ensure_weight_tying: bool = False
    fan_in_fan_out: bool = False  # how the base's weights lie, which the parameter table knows

    def scale(self, rank: int, alpha: float) -> float:
        """What a delta of some rank is multiplied with."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def replicated(self) -> tuple[int, ...] | None:
        """The layer that each slot of `layer_replication` is; None without it."""
        if not self.layer_replication:
            return None
        return tuple(layer for start, stop in self.layer_replication for layer in range(start, stop))


_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "revision", "task_type", "inference_mode", "lora_dropout", "megatron_config",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "peft_version", "qalora_group_size", "merge_weights", "runtime_config",
})  # fmt: skip
"""Keys of training, of where things came from, and of what another key switches on."""

_UNSUPPORTED: Mapping[str, str] = {
    "alora_invocation_tokens": "an aLoRA, which begins in the middle of a text",
    "arrow_config": "Arrow, which chooses among adapters token by token",
    "kasa_config": "KaSA, which alters the base's weights",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA of parameters (experts)",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
"""Keys that make another thing of an adapter -> what; empty values are fine."""

_ALTERED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""`init_lora_weights` that change the base's weights before training: what was saved is for those."""


def read_lora_config(directory: Path) -> LoraConfig:
    """The configuration of an adapter's directory.

    Raises:
      UsageError: it is there, but not of a LoRA, or of a kind that is not supported.
      JaxchatError: it is missing or malformed, or has a key that is unknown.
    """
    path = directory / CONFIG
    if not path.exists():
        raise UsageError(
            f"{directory}: no {CONFIG} is there; expected the folder of a PEFT adapter, with it and "
            "adapter_model.safetensors"
        )
    values = read_json(path)
    _check_keys(path, values)
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    # An explicit null of what cannot be null is PEFT's default.
    given = {name: value for name, value in values.items() if name in known and value is not None}
    config = checked(given, LoraConfig, where=str(path), advice="save the adapter again with PEFT")
    _check_values(path, config)
    return config


def _check_keys(path: Path, values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UsageError(
            f"{path}: peft_type is {shown(kind)}; expected LORA (with DoRA and rsLoRA), the one kind of "
            "adapter that is supported"
        )
    for name, what in _UNSUPPORTED.items():
        if values.get(name):
            raise UsageError(
                f"{path}: {name} is {shown(values[name])}: {what} is not supported; take a plain LoRA or DoRA"
            )
    known = {field.name for field in dataclasses.fields(LoraConfig)} | _WITHOUT_EFFECT | _UNSUPPORTED.keys()
    for name, value in values.items():
        if name not in known and value not in (None, False, [], {}, ""):
            raise UsageError(
                f"{path}: unknown key {shown(name)}, which is {shown(value)}: it may change what the adapter "
                "does; remove it if it does not"
            )


def _check_values(path: Path, config: LoraConfig) -> None:
    if config.bias not in ("none", "all", "lora_only"):
        raise JaxchatError(f"{path}: bias is {shown(config.bias)}; expected none, all or lora_only")
    if config.use_dora and config.lora_bias:
        raise JaxchatError(f"{path}: use_dora and lora_bias are both true; expected one of them, as in PEFT")
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"):
        given = getattr(config, key)
        if isinstance(given, list) and len(given) > MAX_LAYERS:
            raise JaxchatError(f"{path}: {key} has {len(given)} entries; expected at most {MAX_LAYERS}")
    for start, stop in config.layer_replication or ():
        if not start < stop <= MAX_LAYERS:
            raise JaxchatError(
                f"{path}: layer_replication has [{start}, {stop}]; expected [first, last + 1] of some layers"
            )
    if sum(stop - start for start, stop in config.layer_replication or ()) > MAX_LAYERS:
        raise JaxchatError(f"{path}: layer_replication makes more than {MAX_LAYERS} layers; shorten it")


def alters_base(config: LoraConfig) -> bool:
    """Whether the adapter was begun by a method that changes the base's weights."""
    init = config.init_lora_weights
    return isinstance(init, str) and init.lower().startswith(_ALTERED_BASE)


def targeted(config: LoraConfig, names: Sequence[str], linear: Sequence[str], *, where: str) -> set[str]:
    """Which of a model's modules PEFT would give a delta to.

    Args:
      config: of the adapter.
      names: all modules: projections, embedding and head, as PEFT sees them (without `base_model.model.`).
      linear: those of them that are `all-linear`.
      where: the file, for errors.
    """
    wanted = config.target_modules
    if wanted is None:
        return set()
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        found = list(linear)
    else:
        found = _named(wanted, names, f"{where}: target_modules")
        if not isinstance(wanted, str) and config.layers_to_transform not in (None, []):
            found = [name for name in found if _is_transformed(config, name)]
    left_out = set(_named(config.exclude_modules or [], names, f"{where}: exclude_modules"))
    entries = config.modules_to_save or []
    whole = {name for name in names if any(f".{entry}." in f".{name}." for entry in entries)}
    return set(found) - left_out - whole


def unmatched(config: LoraConfig, names: Sequence[str]) -> list[str]:
    """The entries of `target_modules` that are no module of a model."""
    wanted, known = config.target_modules, {tail for name in names for tail in _tails(name)}
    return [entry for entry in wanted if entry not in known] if isinstance(wanted, list) else []


def saved(config: LoraConfig, names: Sequence[str]) -> list[str]:
    """Those of a model's modules that `modules_to_save` names: they, or what they are in, end so.

    Not at a dot: `norm` is `input_layernorm`, too (`peft.utils.other._set_trainable`).
    """
    entries = tuple(config.modules_to_save or [])

    def within(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]

    return [name for name in names if any(part.endswith(entries) for part in within(name))]


def pattern_values(
    pattern: Mapping[str, Any] | None, names: Sequence[str], default: Any, *, where: str
) -> dict[str, Any]:
    """The value that `rank_pattern` or `alpha_pattern` has for each module: of the first key that fits."""
    keys = list(pattern or {})
    # Of a plain key (nearly all are) a dot is a dot, which spares a comparison with every name.
    literal = {key: place for place, key in enumerate(keys) if PLAIN.fullmatch(key)}
    others = [place for place, key in enumerate(keys) if key not in literal]
    fits = matches([rf"(?:.*\.)?(?:{keys[place]})" for place in others], names, where=where)
    found = {}
    for number, name in enumerate(names):
        places = [literal[tail] for tail in _tails(name) if tail in literal]
        places += [place for place, row in zip(others, fits, strict=True) if row[number]]
        found[name] = (pattern or {})[keys[min(places)]] if places else default
    return found


def _named(wanted: list[str] | str, names: Sequence[str], where: str) -> list[str]:
    if isinstance(wanted, str):
        (fits,) = matches([wanted], names, where=where)
        return [name for name, does in zip(names, fits, strict=True) if does]
    entries = set(wanted)
    return [name for name in names if not entries.isdisjoint(_tails(name))]


def _tails(name: str) -> list[str]:
    """A name, and what follows each of its dots."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _is_transformed(config: LoraConfig, name: str) -> bool:
    """Whether `layers_to_transform` has the layer that a module's name says, the first number in it."""
    wanted = config.layers_to_transform
    patterns = config.layers_pattern or []
    match = None
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = match or re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(\d+)\.", name)
    layers = [wanted] if isinstance(wanted, int) else (wanted or [])
    return match is not None and int(match[1]) in layers
