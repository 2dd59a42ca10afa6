"""Measures the model in the box: held-out loss, how often it speaks of what it was asked, and its answers.

Examples:
  python tools/evaluate_demo.py --model demo-run/hf --data ../shared/data/corpora
  python tools/evaluate_demo.py --model storyteller --data ../shared/data/corpora --out storyteller
"""

import collections
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jaxchat
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.cli.command_line import Command, exit_process, run
from jaxchat.cli.model_flags import MODEL
from jaxchat.files import write_atomically
from jaxchat.options import Flag
from tools.stories import Corpus, Story, read_corpus

PROMPTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # One thing, in words that no training dialogue uses.
    ("I'd love to hear about a whale.", ("whale",)),
    ("Let me hear a tale of a dragon.", ("dragon",)),
    ("How about a story of a train?", ("train",)),
    ("Give me a story that has a kite in it.", ("kite",)),
    ("Tell us a tale about a bee!", ("bee",)),
    ("May I have a bedtime story about the moon?", ("moon",)),
    ("Let us have a story with a drum.", ("drum",)),
    ("Something about a penguin, please.", ("penguin",)),
    ("A tale of a queen, if you like.", ("queen",)),
    ("What about a story with snow?", ("snow",)),
    ("Invent a story that is about an umbrella.", ("umbrella",)),
    ("My son likes trucks. Tell him a story about a truck.", ("truck",)),
    ("Give me a tale about a cookie.", ("cookie",)),
    ("I am in the mood for a story about a lion.", ("lion",)),
    # Two things that no training story is about together.
    ("Tell me a story about a frog and a bicycle.", ("frog", "bicycle")),
    ("Tell me a story about a rabbit and a drum.", ("rabbit", "drum")),
    ("Can you tell me a story about a duck and a hat?", ("duck", "hat")),
    ("Tell me a story about a dog and a guitar.", ("dog", "guitar")),
    ("Please tell me a story about a lion and a cake.", ("lion", "cake")),
    ("Tell me a story about a princess and a truck.", ("princess", "truck")),
    ("Write a story about a cat and a rocket.", ("cat", "rocket")),
    ("I want to hear a story about a bear and a boat.", ("bear", "boat")),
    ("Tell a story with a robot and a flower in it.", ("robot", "flower")),
    ("Could you tell a story about a monkey and a mirror?", ("monkey", "mirror")),
    ("Tell me a story about an elephant and a ladder.", ("elephant", "ladder")),
    ("Make up a story about a fish and a key!", ("fish", "key")),
    ("Tell me a story about a pirate and a garden.", ("pirate", "garden")),
    ("A story about a mouse and a ladder, please!", ("mouse", "ladder")),
    ("Tell me a story about a butterfly and a box.", ("butterfly", "box")),
    ("Write a short story with a horse and a cookie.", ("horse", "cookie")),
    ("Tell me a story about a turtle and an apple.", ("turtle", "apple")),
    ("I would like a story about a wizard and soup.", ("wizard", "soup")),
    ("Tell a short story about an owl and a book.", ("owl", "book")),
    ("Do you know a story about a cow and a river?", ("cow", "river")),
    ("Tell me a story about a spider and a cup.", ("spider", "cup")),
    ("Hello, can you tell me a story about a squirrel and a car?", ("squirrel", "car")),
    ("Tell me a story about a doll and the rain.", ("doll", "rain")),
    ("Tell me a story about a rocket and a pig.", ("rocket", "pig")),
    # A name and a thing, or three things.
    ("Tell me a story about Rosie and a shark.", ("Rosie", "shark")),
    ("Tell me a story about a girl named Stella and a pumpkin.", ("Stella", "pumpkin")),
    ("Tell me a story about Oliver and a bird.", ("Oliver", "bird")),
    ("Can you tell me a story about a boy named Leo and a sandwich?", ("Leo", "sandwich")),
    ("Tell me a story about Clara and a tree.", ("Clara", "tree")),
    ("Please tell me a story about Harry and a spoon.", ("Harry", "spoon")),
    ("Tell me a story about a boy named Toby and a goat.", ("Toby", "goat")),
    ("Tell me a story about Nora and a puzzle.", ("Nora", "puzzle")),
    ("Tell me a story about a fox, a ball and a house.", ("fox", "ball", "house")),
    ("Tell me a story about a dog, a hat and a lake.", ("dog", "hat", "lake")),
    ("Write a story about Grace, a kitten and a ladder.", ("Grace", "kitten", "ladder")),
    ("Tell me a story about a king, a cake and a bird.", ("king", "cake", "bird")),
)
"""What is asked, and the things it asks for. Written before any model was trained."""

_LENGTH = 400
"""Tokens a reply may have: it and the question after it fit the context."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure, on what."""

    model: Annotated[str, MODEL]
    data: Annotated[
        str,
        Flag(
            help="The folder of the corpora, whose held-out stories give the loss",
            example="--data corpora",
            value="DIR",
        ),
    ]
    out: Annotated[
        str | None,
        Flag(help="Write EVALUATION.json and SAMPLES.md there", example="--out storyteller", value="DIR"),
    ] = None
    seed: Annotated[int, Flag(help="Of the sampled replies", example="--seed 7")] = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code: 0, 1 failure, 2 wrong usage, 130 interrupted.

    Args:
      argv: the arguments, the program's name first; None is `sys.argv`.
    """
    command = Command(usage=f"{__doc__}\n", request=Request, run=_run)
    return run(command, argv, program="python tools/evaluate_demo.py")


def _run(request: Request, given: frozenset[str]) -> int:
    corpus = read_corpus(Path(request.data))
    directory = ModelDirectory.at(request.model)
    model = jaxchat.load(directory)
    figures: dict[str, Any] = held_out(model, corpus.held_out)
    replies: dict[str, list[dict[str, Any]]] = {}
    for mode, options in (("greedy", {}), ("sampled", directory.recommended_sampling)):
        replies[mode] = list(ask_all(model, options, request.seed))
        figures[mode] = rates(replies[mode])
    print(json.dumps(figures, indent=1))
    if request.out:
        out = Path(request.out)
        write_atomically(out / "EVALUATION.json", f"{json.dumps(figures, indent=1)}\n".encode())
        write_atomically(out / "SAMPLES.md", as_markdown(replies).encode())
    return 0


def held_out(model: jaxchat.Model, stories: Sequence[Story]) -> dict[str, float]:
    """Loss on stories never trained on, as plain text: nats a token (end included) and a character."""
    end = [model.eos_ids[0]]
    scores = model.score(token_ids=[model.encode(story.text) + end for story in stories])
    total = -sum(score.total for score in scores)
    return {
        "held_out_stories": len(stories),
        "held_out_nats_per_token": round(total / sum(len(score.logprobs) for score in scores), 4),
        "held_out_nats_per_character": round(total / sum(len(story.text) for story in stories), 4),
    }


def ask_all(model: jaxchat.Model, options: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Every prompt in a chat of its own, and after the story who is in it."""
    for number, (prompt, things) in enumerate(PROMPTS):
        chat = model.chat_session()
        story = _finished(chat.send(prompt, max_new_tokens=_LENGTH, seed=seed + number, **options))
        question = "Who is in the story?"
        answer = _finished(chat.send(question, max_new_tokens=40, seed=seed + number, **options))
        yield {
            "prompt": prompt,
            "reply": story.text,
            "finished": story.finish_reason != "length",
            "missing": [thing for thing in things if not mentions(story.text or "", thing)],
            "asked": len(things),
            "who": answer.text,
            "who_is_true": answers_truly(answer.text or "", story.text or ""),
        }


def _finished(stream: jaxchat.TextStream) -> jaxchat.Result:
    collections.deque(stream, maxlen=0)
    return stream.result


def mentions(text: str, thing: str) -> bool:
    """Whether a word of the text is the thing, its plural or its possessive."""
    stem = re.escape(thing)
    forms = [stem, stem + "s", stem + "es", "mice" if thing == "mouse" else stem]
    if thing.endswith("y"):
        forms.append(re.escape(thing[:-1]) + "ies")
    return re.search(rf"\b({'|'.join(forms)})\b", text, re.IGNORECASE) is not None


def answers_truly(answer: str, story: str) -> bool:
    """Whether everyone the answer names is in the story, and it names someone."""
    named = re.findall(r"\b[A-Z][a-z]+\b", answer.removeprefix("A ").removeprefix("An "))
    named += re.findall(r"\b[Aa]n? ([a-z]+)", answer)
    return bool(named) and all(mentions(story, name) for name in named)


def rates(replies: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of the replies, from 0 to 1."""
    count = len(replies)
    return {
        "prompts": count,
        "mentions_all_that_was_asked": round(sum(not r["missing"] for r in replies) / count, 3),
        "mentions_some_of_it": round(sum(len(r["missing"]) < r["asked"] for r in replies) / count, 3),
        "ends_by_itself": round(sum(r["finished"] for r in replies) / count, 3),
        "says_truly_who_is_in_it": round(sum(r["who_is_true"] for r in replies) / count, 3),
    }


def as_markdown(replies: dict[str, list[dict[str, Any]]]) -> str:
    """All replies, to be read."""
    lines = ["# What the model answered to 50 prompts", ""]
    lines += ["Unedited, as `tools/evaluate_demo.py` recorded them. After each story: who is in it?", ""]
    for mode, rows in replies.items():
        lines += [f"## {mode.capitalize()}", ""]
        for row in rows:
            missing = f" *(not mentioned: {', '.join(row['missing'])})*" if row["missing"] else ""
            lines += [f"**{row['prompt']}**{missing}", ""]
            lines += [f"> {line}  " for line in str(row["reply"]).split("\n")]
            lines += ["", f"Who is in the story? — {row['who']}", ""]
    return "\n".join(lines)


def unseen(things: Sequence[str], corpus: Corpus) -> bool:
    """Whether no training story can have been asked for with all these things."""
    return not any(
        all(thing in story.topics or thing in story.names for thing in things) for story in corpus.train
    )


if __name__ == "__main__":
    exit_process(main())
