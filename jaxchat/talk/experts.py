"""A panel of experts: one model chooses who answers, by how probable it finds their names."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxchat import demo
from jaxchat.chat.batch import Message
from jaxchat.chat.replies import TextStream
from jaxchat.chat.session import ChatSession
from jaxchat.errors import UsageError
from jaxchat.files import UnreadableError, read_small_text
from jaxchat.options import GenerateOptions, setting_text, with_setting
from jaxchat.runtime import Model
from jaxchat.talk.models import ModelLoader
from jaxchat.values import wrong

PROMPT = "Please classify the question to one of these classes:\n{classes}\n\nQuestion: {question}"
"""What the selector is asked; `{classes}` are the numbered names and descriptions."""

_EXPERT_KEYS = ("name", "says", "description", "model", "layer_spec", "system", "options")
_PANEL_KEYS = ("experts", "selector", "prompt", "sticky")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expert:
    """Who may answer.

    Attributes:
      name: short; the selector's probability of saying it decides.
      says: instead of the name, how the selector would begin to answer a question for this expert. Small
        models know no classes, but how an answer begins.
      description: what the expert is for, shown to the selector.
      model: who answers, under its plan.
      system: the system prompt.
      options: how it answers.
    """

    name: str
    model: Model
    says: str = ""
    description: str = ""
    system: str | None = None
    options: GenerateOptions = dataclasses.field(default_factory=GenerateOptions)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the selector decided.

    Attributes:
      name: the most probable expert's.
      probabilities: of each name, given that it is one of them; they add up to 1.
    """

    name: str
    probabilities: Mapping[str, float]


def choose(model: Model, question: str, labels: Sequence[str]) -> Choice:
    """Which label a model would most probably answer a question with.

    All labels are scored in one batch of forward passes over the question and the label; the probability of a
    label is that of all its tokens, among those of the labels.

    Args:
      model: who decides; needs a chat template.
      question: the user's message.
      labels: what the assistant might answer, at least one and all different.
    """
    if len(set(labels)) != len(labels) or not labels:
        raise UsageError(f"choose among {list(labels)}: expected at least one label, and no two alike")
    talk = model.conversation()
    talk.add_typed(question)
    openings = [talk.open(prefix=label) for label in labels]
    ids = [[*opening.prompt, *opening.ids] for opening in openings]
    scores = model.score(token_ids=ids, batch_size=len(labels))
    totals = np.array(
        [
            np.sum(score.logprobs[len(opening.prompt) - 1 :])
            for opening, score in zip(openings, scores, strict=True)
        ]
    )
    weights = np.exp(totals - totals.max())
    weights /= weights.sum()
    best = labels[int(weights.argmax())]
    return Choice(best, dict(zip(labels, weights.tolist(), strict=True)))


class Panel:
    """Experts, each with a conversation of its own, and the selector.

    Args:
      experts: at least one, with different names.
      selector: the model that chooses; default the first expert's.
      prompt: what it is asked, with `{question}` and, unless every expert `says` something, `{classes}`.
      sticky: choose at the first question only, until `restart`.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        selector: Model | None = None,
        *,
        prompt: str = PROMPT,
        sticky: bool = False,
    ):
        if not experts:
            raise UsageError("a panel needs at least one expert")
        by_name = not all(expert.says for expert in experts)
        for field in ("{classes}", "{question}") if by_name else ("{question}",):
            if field not in prompt:
                raise UsageError(f"the selector's prompt has no {field}; write it where that belongs")
        self.experts = {expert.name: expert for expert in experts}
        labels = [expert.says or expert.name for expert in experts]
        if len(self.experts) != len(experts):
            raise UsageError(
                f"two experts have one name: {', '.join(e.name for e in experts)}; give each its own"
            )
        if len(set(labels)) != len(labels):
            raise UsageError(f"two experts say the same: {', '.join(labels)}; let each say something else")
        self.selector = selector or experts[0].model
        self.prompt, self.sticky = prompt, sticky
        self.restart()

    def restart(self) -> None:
        """Forgets all conversations, and the choice."""
        self._sessions: dict[str, ChatSession] = {}
        self._choice: Choice | None = None

    def choose(self, question: str) -> Choice:
        """Who answers a question; the first choice again where it sticks."""
        if self._choice is not None and self.sticky:
            return self._choice
        lines = [
            f"{number}. {expert.name}" + (f": {expert.description}" if expert.description else "")
            for number, expert in enumerate(self.experts.values(), 1)
        ]
        asked = self.prompt.replace("{classes}", "\n".join(lines)).replace("{question}", question)
        names = {expert.says or name: name for name, expert in self.experts.items()}
        found = choose(self.selector, asked, list(names))
        shares = {names[label]: share for label, share in found.probabilities.items()}
        self._choice = Choice(names[found.name], shares)
        return self._choice

    def ask(self, question: str) -> tuple[Choice, TextStream]:
        """Chooses an expert and streams its answer, which joins that expert's conversation."""
        choice = self.choose(question)
        expert = self.experts[choice.name]
        if choice.name not in self._sessions:
            self._sessions[choice.name] = expert.model.chat_session(expert.system)
        return choice, self._sessions[choice.name].send(question, options=expert.options)

    def ask_all(self, question: str) -> Iterator[tuple[str, Message]]:
        """Every expert's answer to a question, of which nothing is remembered.

        Those that run the same weights, plan and options answer as one batch.
        """
        groups: dict[Any, list[Expert]] = {}
        for expert in self.experts.values():
            key = (id(expert.model.engine), expert.model.plan, expert.options)
            groups.setdefault(key, []).append(expert)
        for group in groups.values():
            model = group[0].model
            batch = model.chat_batch([model.conversation(system=expert.system) for expert in group])
            replies = batch.send([question] * len(group), group[0].options)
            for expert, reply in zip(group, replies, strict=True):
                assert reply is not None
                yield expert.name, reply


def read_panel(path: str | Path, models: ModelLoader, options: GenerateOptions) -> Panel:
    """A panel from a YAML file.

        experts:
          - name: Stories
            says: Once upon a time        # optional: how the selector would begin to answer for this one
            description: tales about animals and children
            model: path/to/model          # relative to this file, or box; default the selector's
            layer_spec: 0:3,2:            # optional, as the other keys from here on
            system: You tell stories.
            options: {temperature: 0.8}   # as in GenerateOptions
        selector: {model: path/to/model}  # default the first expert's
        prompt: "..."                     # with {classes} and {question}
        sticky: false

    Args:
      path: the file.
      models: loads what it names.
      options: of experts, before their own.

    Raises:
      UsageError: there is no such file, or it does not say this; names file and key.
    """
    path = Path(path)
    root = _mapping(_parsed(path), str(path), _PANEL_KEYS)
    entries = root.get("experts")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: experts: expected a list of at least one expert")
    selector = None
    if "selector" in root:
        where = f"{path}: selector"
        selector = _model(
            _mapping(root["selector"], where, ("model", "layer_spec")), where, path, models, None
        )
    experts = [
        _expert(entry, f"{path}: experts[{number}]", path, models, options, selector)
        for number, entry in enumerate(entries)
    ]
    sticky = root.get("sticky", False)
    if not isinstance(sticky, bool):
        raise UsageError(f"{path}: sticky is {sticky!r}: expected true or false")
    prompt = _text(root, "prompt", str(path))
    with _named(str(path)):
        return Panel(experts, selector, prompt=PROMPT if prompt is None else prompt, sticky=sticky)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Puts the place in the file before what is wrong there."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _parsed(path: Path) -> Any:
    try:
        return yaml.safe_load(read_small_text(path))
    except UnreadableError as error:
        raise UsageError(f"{path}: {error}; give a YAML file of experts") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"{path}: not YAML: {' '.join(str(error).split())}; give a YAML file of experts"
        ) from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deep; give a YAML file of experts") from None


def _expert(
    entry: Any, where: str, path: Path, models: ModelLoader, options: GenerateOptions, default: Model | None
) -> Expert:
    values = _mapping(entry, where, _EXPERT_KEYS)
    name = _text(values, "name", where)
    if not name:
        raise UsageError(f"{where}: name is missing: the selector chooses by it")
    own = values.get("options", {})
    if not isinstance(own, dict):
        raise UsageError(f"{where}.options is {own!r}: expected names and values, as in temperature: 0.8")
    for key, value in own.items():
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, dict):
            raise wrong(f"{where}.options: {key}", value, "one value, or a list of them")
        text = value if isinstance(value, str) else setting_text(value)
        options = with_setting(options, str(key), text, where=f"{where}.options: ")
    return Expert(
        name=name,
        says=_text(values, "says", where) or "",
        description=_text(values, "description", where) or "",
        model=_model(values, where, path, models, default),
        system=_text(values, "system", where),
        options=options,
    )


def _model(
    values: Mapping[str, Any], where: str, path: Path, models: ModelLoader, default: Model | None
) -> Model:
    directory, spec = (_text(values, key, where) for key in ("model", "layer_spec"))
    if directory is None:
        if default is None:
            raise UsageError(f"{where}: model is missing: name a directory, here or for the selector")
        with _named(f"{where}.layer_spec"):
            return default if spec is None else default.with_plan(spec)
    beside = path.parent / directory
    with _named(where):
        return models(directory if directory == demo.NAME and not beside.is_dir() else beside, spec)


def _mapping(value: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected keys and values ({', '.join(keys)}), got {type(value).__name__}")
    for key in value:
        if key not in keys:
            raise UsageError(f"{where}: unknown key {key!r}; expected {', '.join(keys)}")
    return value


def _text(values: Mapping[str, Any], key: str, where: str) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{where}.{key} is {value!r}: expected text (put it in quotes)")
    return value
