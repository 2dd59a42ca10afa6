"""What is asked for: how to continue a text, and all that one command line says. Needs no JAX."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

Format = Literal["chat", "completion"]
Overflow = Literal["error", "truncate_oldest"]

KV_DTYPES = ("float32", "bfloat16", "int8")
"""What the KV cache can be kept in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How to continue a text. Every generating function takes these as keyword arguments.

    Attributes:
      max_new_tokens: at most so many; None is until the model stops or the context is full.
      temperature: divides the logits; 0 is greedy.
      top_k: sample from the k most probable tokens; 0 is off.
      top_p: sample from the fewest tokens with this total probability; 1 is off.
      min_p: leave out tokens less probable than this fraction of the most probable; 0 is off.
      repetition_penalty: weakens tokens of prompt and output (CTRL); 1 is off.
      presence_penalty: subtracted once from the logit of a token already generated; 0 is off.
      frequency_penalty: subtracted for every time it was generated; 0 is off.
      seed: the same seed gives the same text on the same backend; prompt i of a batch uses seed + i.
      stop: strings that end the text; they are not part of it.
      stop_token_ids: token ids that end it, beside the model's own.
      ignore_eos: do not end at the model's own end-of-sequence tokens.
      overflow: `error` or `truncate_oldest`, see `Session.generate`.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    overflow: Overflow = "error"

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, without empty strings."""
        return tuple(s for s in ((self.stop,) if isinstance(self.stop, str) else self.stop) if s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One run of the command line.

    Attributes:
      model: the model directory; None with a recipe.
      model_name: what people call it.
      recipe, model_paths, keep_identity: as in `jaxchat.load`.
      layer_spec, dtype, quant, kv_dtype, kernels, max_length, compilation_cache_dir: as in `jaxchat.load`.
      format: None is chat where the model has a template.
      system: the system prompt.
      prompt: the prompt, or with `interactive` the first message.
      interactive: chat, reading messages from standard input.
      json: print one JSON object.
      hide_banner: start without one.
      options: how to continue.
    """

    model: str | None
    model_name: str
    recipe: str | None
    model_paths: Mapping[str, str]
    keep_identity: bool
    layer_spec: str | None
    dtype: str | None
    quant: str | None
    kv_dtype: str | None
    kernels: str
    max_length: int | None
    compilation_cache_dir: str | None
    format: Format | None
    system: str | None
    prompt: str | None
    interactive: bool
    json: bool
    hide_banner: bool
    options: GenerateOptions
