"""Which model a saved chat belongs to: what tells models apart, and in words how two of them differ."""

import dataclasses
import hashlib
import json
from typing import Any

import msgspec
import numpy as np

from jaxchat.adapter_use import Uses
from jaxchat.checkpoints.fingerprint import weights_fingerprint
from jaxchat.engine.session import Engine
from jaxchat.errors import option
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.tokenizer import Tokenizer
from jaxchat.visible import shown


class Fingerprint(msgspec.Struct, frozen=True, rename={"template": "chat template"}):
    """What tells models apart, as JSON gives it back.

    Attributes:
      config: the fields of the `ModelConfig`.
      weights: parameter -> its `format`, and what tells its values.
      kernels: which kernels laid the parameters out.
      tokenizer, template: digests of what they do.
      adapters: digests of those that are used, each with its strength and slot.
    """

    config: dict[str, Any]
    weights: dict[str, dict[str, str]]
    kernels: str
    tokenizer: str
    template: str
    adapters: list[str] = []  # msgspec makes a list for each


_PROBE = "The quick brown fox, 3.14 × 10²: naïve café, 東京, привет!\n\t<|im_start|> 🙂"


def fingerprint_of(
    engine: Engine, tokenizer: Tokenizer, template: ChatTemplate, uses: Uses = ()
) -> Fingerprint:
    """The fingerprint of a model: its configuration, samples of its weights, what its text files do.

    And of what is used of the engine's adapters.
    """
    return Fingerprint(
        # As JSON has it: lists, and no tuples.
        config=json.loads(json.dumps(dataclasses.asdict(engine.config))),
        weights=weights_fingerprint(engine.params),
        kernels=engine.kernels.name,
        tokenizer=_tokenizer(tokenizer),
        template=_template(template),
        adapters=[] if engine.adapters is None else engine.adapters.identity(uses),
    )


def described(fingerprint: Fingerprint) -> str:
    """A model in a few words."""
    config = fingerprint.config
    formats = [weight.get("format", "no format") for weight in fingerprint.weights.values()]
    common = max(sorted(set(formats)), key=formats.count, default="no weights")
    kind, layers, width = (config.get(key) for key in ("model_type", "num_layers", "hidden_size"))
    return f"{kind}, {layers} layers of width {width}, {common}"


def difference(saved: Fingerprint, here: Fingerprint) -> str | None:
    """How two fingerprints differ, in words; None if they do not."""
    for key in saved.config | here.config:
        before, now = saved.config.get(key), here.config.get(key)
        if before != now:
            return f"{key} was {shown(before)} and is {shown(now)}"
    both = saved.weights, here.weights
    names = [n for n in sorted(both[0].keys() | both[1].keys()) if both[0].get(n) != both[1].get(n)]
    if names:
        before, now = (weights.get(names[0], {}).get("format", "absent") for weights in both)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = f"was {before} and is {now}" if before != now else "has other values"
        if saved.kernels != here.kernels:
            what += f" (or lies differently: it was saved with {option('kernels', saved.kernels)})"
        return f"{names[0]}{more} {what}"
    if saved.adapters != here.adapters:
        return (
            f"it was made with {_adapters(saved.adapters)}, and {_adapters(here.adapters)} is used here: "
            f"give the {option('adapter')} it was made with"
        )
    for name, before, now in (
        ("tokenizer", saved.tokenizer, here.tokenizer),
        ("chat template", saved.template, here.template),
    ):
        if before != now:
            return f"the {name} is another one"
    return None


def _adapters(identity: list[str]) -> str:
    return f"adapter {' and '.join(map(shown, identity))}" if identity else "no adapter"


def _tokenizer(tokenizer: Tokenizer) -> str:
    """What it does, not what its files are: the ids of a text, and the text of some ids."""
    ids = np.linspace(0, max(tokenizer.vocab_size - 1, 0), 256).astype(int).tolist()
    behaviour = (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_ids,
        sorted(tokenizer.special_tokens.items()),
        tokenizer.encode(_PROBE),
        [tokenizer.decode([i]) for i in ids],
    )
    return hashlib.blake2b(repr(behaviour).encode(), digest_size=8).hexdigest()


def _template(template: ChatTemplate) -> str:
    text = repr((template.source, sorted(template.variables.items())))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
