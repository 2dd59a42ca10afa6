"""The supported architectures: one small file each, data for the one decoder in `jaxchat/model.py`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxchat.config import ModelConfig, Param
from jaxchat.errors import JaxchatError, UsageError, told
from jaxchat.families import gemma, gpt2, llama, mistral, phi3, qwen
from jaxchat.families.hf_config import HfConfig
from jaxchat.families.tables import Family
from jaxchat.visible import shown

FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES,
    *mistral.FAMILIES,
    *qwen.FAMILIES,
    *gemma.FAMILIES,
    *phi3.FAMILIES,
    *gpt2.FAMILIES,
)
BY_MODEL_TYPE: dict[str, Family] = {t: family for family in FAMILIES for t in family.model_types}


def read_config(config: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
    """The configuration in a Hugging Face `config.json`.

    Args:
      config: what the file says.
      source: names the file in messages.

    Raises:
      UsageError: the `model_type` is not supported (the message lists those that are).
      JaxchatError: a key is missing or impossible.
    """
    model_type = config.get("model_type")
    family = BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        supported = ", ".join(sorted(BY_MODEL_TYPE))
        raise UsageError(f"{source}: model_type {shown(model_type)} is not supported; supported: {supported}")
    result = family.config(HfConfig(config, source))
    _check(result, source)
    return result


def relayered_config(values: Mapping[str, Any], config: ModelConfig, *, source: str) -> dict[str, Any]:
    """The Hugging Face `config.json` of a model whose layers and head are those of `config`.

    Args:
      values: `config.json` of a model that is the same but for its layers, and whether the head is tied.
      config: what the result is to say.
      source: names `values` in messages.

    Raises:
      UsageError: the family's configuration cannot say it; the message has the field.
    """
    family = family_of(config)
    result = {**family.relayer(values, config), "tie_word_embeddings": config.tied_embeddings}
    found = read_config(result, source=source)
    for field in dataclasses.fields(ModelConfig):
        said, meant = getattr(found, field.name), getattr(config, field.name)
        if said != meant and field.name not in ("model_type", "bos_id", "eos_ids"):
            raise UsageError(
                f"{source}: a Hugging Face {found.model_type} configuration cannot describe these layers: "
                f"{field.name} would be {_shortened(said)}, not {_shortened(meant)}; a native checkpoint "
                f"that records the plan can ({told('plan=record', 'leave --to_hf and --plan bake out')})"
            )
    return result


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def parameter_table(config: ModelConfig) -> tuple[Param, ...]:
    """The parameters of a model, in checkpoint order."""
    return family_of(config).params(config)


def count_parameters(config: ModelConfig, slots: int | None = None) -> int:
    """The number of scalars of a model; a tied head counts once.

    Args:
      config: the model.
      slots: layers that run under a plan, each counted as often as it runs; default every layer once, and
        of layers that share a tensor (`ModelConfig.layer_rows`) that tensor once.

    >>> count_parameters(llama3_8b, 56)  # doctest: +SKIP
    13264949248
    """

    def copies(param: Param) -> int:
        return slots if slots is not None and param.per_layer else param.rows(config)

    return sum(math.prod(p.layer_shape(config)) * copies(p) for p in parameter_table(config))


def family_of(config: ModelConfig) -> Family:
    """The family that reads the model."""
    return BY_MODEL_TYPE[config.model_type]


def _check(config: ModelConfig, source: str) -> None:
    if config.num_heads % config.num_kv_heads:
        raise JaxchatError(
            f"{source}: {config.num_heads} attention heads are not a multiple of "
            f"{config.num_kv_heads} key/value heads; download the file again"
        )
    if config.bos_id is not None and config.bos_id >= config.vocab_size:
        raise JaxchatError(
            f"{source}: bos_token_id is {config.bos_id}; expected an id below vocab_size, {config.vocab_size}"
        )
    optional = {"layer_ropes": config.ropes, "layer_blocks": len(config.blocks) > 1}
    for name in ("layer_windows", "layer_attn_scales", *(name for name, used in optional.items() if used)):
        if len(getattr(config, name)) != config.num_layers:
            raise JaxchatError(
                f"{source}: {len(getattr(config, name))} entries of {name} for {config.num_layers} layers"
            )


__all__ = [
    "BY_MODEL_TYPE",
    "FAMILIES",
    "Family",
    "count_parameters",
    "family_of",
    "parameter_table",
    "read_config",
    "relayered_config",
]
