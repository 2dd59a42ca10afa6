"""The prompt formats that people know by name: a row a name, the Jinja text in `templates/`.

For models that come without a chat template, as those of before 2024 do. A name is only ever suggested; what
applies one is the user.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxchat.errors import UsageError, option
from jaxchat.files import UnreadableError, read_small_text
from jaxchat.text.chat_template import ChatTemplate, special_texts
from jaxchat.text.tokenizer import Tokenizer

_FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class NamedTemplate:
    """One prompt format.

    Attributes:
        file: the Jinja text's, without `.jinja`.
        stop_strings: what ends a reply, beside the tokens that end a text. What the template itself writes
            behind a reply is found out by rendering, and need not stand here.
        models: a regex for names of models that were trained on it, in lower case.
    """

    file: str
    stop_strings: tuple[str, ...] = ()
    models: str = r"(?!)"

    @cached_property
    def source(self) -> str:
        """The Jinja text."""
        return (_FOLDER / f"{self.file}.jinja").read_text(encoding="utf-8").removesuffix("\n")


# Of models that fit several, the first row counts.
NAMED: dict[str, NamedTemplate] = {
    "stablevicuna": NamedTemplate("stablevicuna", ("### Human:", "### Assistant:"), r"stable-?vicuna"),
    "vicuna_v0": NamedTemplate("vicuna_v0", ("### Human:",), r"vicuna.*(v0|delta-v0)\b|guanaco"),
    "vicuna_v1.1": NamedTemplate("vicuna_v1.1", ("USER:",), r"vicuna|wizardlm-(13|30|33|70)b|xwin-lm"),
    "koala": NamedTemplate("koala", ("USER:",), r"koala"),
    "dolly": NamedTemplate("dolly", ("### End", "### Instruction:"), r"dolly"),
    "openassistant": NamedTemplate("openassistant", ("<|prompter|>",), r"oasst|open-?assistant"),
    "mistrallite": NamedTemplate("mistrallite", ("<|prompter|>",), r"mistral-?lite"),
    "zephyr": NamedTemplate("zephyr", ("<|user|>",), r"zephyr|tinyllama.*chat"),
    "openhermes": NamedTemplate("chatml", ("<|im_end|>",), r"hermes-2|dolphin-2"),
    "chatml": NamedTemplate("chatml", ("<|im_end|>",)),
    "alpaca": NamedTemplate("alpaca", ("### Instruction:",), r"alpaca|wizardcoder|mythomax|platypus"),
    "rwkv": NamedTemplate("rwkv", ("\n\n",), r"rwkv"),
    "rwkv-world": NamedTemplate("rwkv", ("\n\n",)),  # llama.cpp's name for it, and that of its GGUF files
    "llama2": NamedTemplate("llama2", (), r"llama-?2.*chat|codellama.*instruct"),
    "llama3": NamedTemplate("llama3", ("<|eot_id|>",), r"llama-?3.*instruct"),
    "mistral": NamedTemplate("mistral", (), r"mi[sx]tral.*instruct"),
    "gemma": NamedTemplate("gemma", ("<end_of_turn>",), r"gemma.*-it\b"),
    "phi3": NamedTemplate("phi3", ("<|end|>",), r"phi-?3.*instruct"),
    "openchat": NamedTemplate("openchat", ("<|end_of_turn|>",), r"openchat"),
    "tulu": NamedTemplate("tulu", ("<|user|>",), r"tulu"),
}
"""By name, as `--chat_template` takes it."""


def suggested(model: str) -> str | None:
    """The name of the format that a model's name tells of, if it does."""
    return next((name for name, row in NAMED.items() if re.search(row.models, model.lower())), None)


def advice_on(model: str) -> str:
    """What to say of a model without a chat template beside other advice, "" where its name tells nothing."""
    name = suggested(model)
    return "" if name is None else f"its name suggests {option('chat_template', name)}"


def chosen_template(choice: str | Path, tokenizer: Tokenizer, own: ChatTemplate | None) -> ChatTemplate:
    """The chat template that somebody asked for in place of the model's own.

    Args:
        choice: a name in `NAMED`, or a Jinja file.
        tokenizer: the model's.
        own: the model's own template, if it has one: what it may refer to this one may, too.

    Raises:
        UsageError: there is neither such a name nor such a file.
    """
    variables = special_texts(tokenizer) if own is None else dict(own.variables)
    row = NAMED.get(str(choice))
    if row is None:
        return ChatTemplate(_read(choice), path=choice, variables=variables)
    # Written for plain text, which begins with BOS where the tokenizer puts one, and only there.
    adds_bos = tokenizer.bos_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_id]
    if not adds_bos:
        variables["bos_token"] = ""
    return ChatTemplate(
        row.source, path=f"chat template {choice}", variables=variables, stop_strings=row.stop_strings
    )


def _read(choice: str | Path) -> str:
    flag = option("chat_template", str(choice))
    try:
        return read_small_text(Path(choice))
    except UnreadableError as error:
        names = ", ".join(NAMED)
        raise UsageError(
            f"{flag}: no such name, and no readable file ({error}); give a Jinja file, or one of {names}"
        ) from None
