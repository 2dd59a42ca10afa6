"""Which model a saved chat belongs to: what tells models apart, and in words how two of them differ."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxchat.checkpoints.fingerprint import weights_fingerprint
from jaxchat.engine.session import Engine
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.tokenizer import Tokenizer

Fingerprint = Mapping[str, Any]
"""What tells models apart, as JSON gives it back."""

_PROBE = "The quick brown fox, 3.14 × 10²: naïve café, 東京, привет!\n\t<|im_start|> 🙂"


def fingerprint_of(engine: Engine, tokenizer: Tokenizer, template: ChatTemplate) -> Fingerprint:
    """The fingerprint of a model: its configuration, samples of its weights, what its text files do."""
    found = {
        "config": dataclasses.asdict(engine.config),
        "weights": weights_fingerprint(engine.params),
        "kernels": engine.kernels.name,
        "tokenizer": _tokenizer(tokenizer),
        "chat template": _template(template),
    }
    result: Fingerprint = json.loads(json.dumps(found))
    return result


def described(fingerprint: Fingerprint) -> str:
    """A model in a few words."""
    config = fingerprint["config"]
    formats = [weight["format"] for weight in fingerprint["weights"].values()]
    common = max(sorted(set(formats)), key=formats.count)
    return f"{config['model_type']}, {config['num_layers']} layers of width {config['hidden_size']}, {common}"


def difference(saved: Fingerprint, here: Fingerprint) -> str | None:
    """How two fingerprints differ, in words; None if they do not."""
    for key in saved["config"] | here["config"]:
        before, now = saved["config"].get(key), here["config"].get(key)
        if before != now:
            return f"{key} was {before} and is {now}"
    weights = saved["weights"], here["weights"]
    names = [
        n for n in sorted(weights[0].keys() | weights[1].keys()) if weights[0].get(n) != weights[1].get(n)
    ]
    if names:
        before, now = (w.get(names[0], {}).get("format", "absent") for w in weights)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = f"was {before} and is {now}" if before != now else "has other values"
        if saved["kernels"] != here["kernels"]:
            what += f" (or lies differently: it was saved with --kernels {saved['kernels']})"
        return f"{names[0]}{more} {what}"
    for key in ("tokenizer", "chat template"):
        if saved[key] != here[key]:
            return f"the {key} is another one"
    return None


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
