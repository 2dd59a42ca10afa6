"""Questions with several answers, as tasks of this kind share them: a question, choices, which is right."""

from collections.abc import Sequence

from jaxchat.evaluation.items import Choice, Request
from jaxchat.evaluation.rows import Row
from jaxchat.evaluation.tasks.task import Example, Frame


def choice(
    row: Row,
    *,
    question: str,
    choices: Sequence[str],
    label: int,
    id: str | None = None,
    group: str = "",
    about: str = "",
) -> Example:
    """A question whose choices follow it after a blank.

    Raises:
      JaxchatError: fewer than two choices, an empty one, or a label that is none of theirs.
    """
    if len(choices) < 2:
        raise row.wrong(f"has {len(choices)} choices; expected at least two")
    if not all(text.strip() for text in choices):
        raise row.wrong("a choice is empty; expected texts")
    if not 0 <= label < len(choices):
        raise row.wrong(f"the answer is {label}; expected 0 to {len(choices) - 1}, the number of a choice")
    name = row.name if id is None else id

    def ask(frame: Frame) -> Choice:
        prompt = frame(question)
        return Choice(name, tuple(Request(prompt, f" {text}") for text in choices), label, group=group)

    return Example(
        id=name,
        place=row.place,
        ask=ask,
        question=question,
        answer=f" {choices[label]}",
        group=group,
        about=about,
    )
