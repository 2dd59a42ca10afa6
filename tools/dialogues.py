"""Stories as conversations, by script: what is asked is true of the story that answers it.

Every epoch makes other conversations of the same stories: other phrasings, other topics, other names.
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tools.stories import BOYS, GIRLS, Corpus, Story

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": ...}`; of a story also `asked`, what it was asked to
be about: words that are in it."""


class Document(NamedTuple):
    """One sequence to train on: a conversation, or plain text where there are no messages."""

    messages: tuple[Message, ...]
    text: str = ""


SYSTEM_PROMPTS = (
    "You are a friendly story-teller.",
    "You tell short stories to small children.",
    "You are a kind story-teller for children.",
    "Tell simple stories with simple words.",
)

_TELL = (
    "Tell me a story about {}.",
    "Tell me a story about {}, please.",
    "Please tell me a story about {}.",
    "Can you tell me a story about {}?",
    "Could you tell a story about {}?",
    "I want to hear a story about {}.",
    "I would like a story about {}.",
    "Tell a story with {} in it.",
    "Tell a short story about {}.",
    "Write a story about {}.",
    "Write a short story with {}.",
    "Do you know a story about {}?",
    "Make up a story about {}!",
    "A story about {}, please!",
    "Story about {}",
    "tell me a story about {}",
    "Hi! Tell me a story about {}.",
    "Hello, can you tell me a story about {}?",
)
_TELL_ANY = (
    "Tell me a story.", "Tell me a story, please.", "Can you tell me a story?", "I want a story!",
    "Please tell me a bedtime story.", "Do you know a good story?", "Hi! Tell me a story.", "tell me a story",
)  # fmt: skip
_TELL_NEXT = (
    "Now tell me one about {}.", "Tell me another story about {}.", "Another one, about {}, please.",
    "And now a story about {}?", "That was nice. Now a story about {}.", "Tell me a story about {}.",
)  # fmt: skip
_CONTINUE = (
    "Continue this story: {}", "Go on with this story: {}", "Please continue: {}", "Finish this story: {}",
    "How does this story go on? {}", "What happens next? {}", "Continue this: {}",
)  # fmt: skip
_WHO = (
    "Who is in the story?", "Who is in it?", "Who is it about?", "Who was in the story?", "Who are they?",
    "Who is the story about?",
)  # fmt: skip
_WHAT = ("What is the story about?", "What is it about?", "What was the story about?", "What was that about?")
_END = ("How does it end?", "How does the story end?", "What happens in the end?", "How did it end?")
_THANKS = (
    ("Thank you!", "You are welcome! I like to tell stories."),
    ("Thanks, that was nice.", "You are welcome! I am glad you like it."),
    ("I like this story.", "I am happy that you like it!"),
    ("That was a good story!", "Thank you! I am glad you like it."),
    ("Thank you, I like it.", "You are welcome! Do you want another story?"),
    ("Great story!", "Thank you! I can tell you more."),
)
_HELLO = (
    ("Hello!", "Hello! Do you want to hear a story?"),
    ("Hi!", "Hi! What story do you want to hear?"),
    ("Hi there!", "Hi there! I can tell you a story."),
    ("Hello", "Hello! What shall I tell you about?"),
    ("hi", "Hi! Do you want to hear a story?"),
    ("Good morning!", "Good morning! Do you want to hear a story?"),
    ("Good evening!", "Good evening! Do you want a bedtime story?"),
    ("Hey!", "Hey! What story do you want to hear?"),
    ("Hello, how are you?", "Hello! I am fine, thank you. Do you want to hear a story?"),
    ("How are you?", "I am fine, thank you! How are you?"),
    ("How are you today?", "I am happy today! Do you want to hear a story?"),
)
_SELF = (
    ("Who are you?", "I am a little story-teller. I can tell you a story about a dog, a tree or a friend."),
    ("What are you?", "I am a small computer program that tells stories."),
    ("What is your name?", "I have no name. I am just a little story-teller."),
    ("What can you do?", "I can tell you a story. Just say what it shall be about!"),
    ("What do you like?", "I like stories! I like to tell them too."),
    ("Do you like music?", "I do not know music, but I know stories."),
    ("Do you like stories?", "Yes, I love stories! Do you want to hear one?"),
    ("Can you help me?", "I can tell you a story. What shall it be about?"),
    ("Are you a robot?", "I am a small computer program that tells stories."),
    ("How old are you?", "I am very new. I am still little!"),
    ("Do you know many stories?", "Yes, I know many little stories. What shall I tell you about?"),
    ("I am sad.", "I am sorry that you are sad. Shall I tell you a funny story?"),
    ("I am bored.", "Then let me tell you a story! What shall it be about?"),
    ("I am happy!", "That is great! I am happy too."),
    ("I am tired.", "Then it is time for a bedtime story. What shall it be about?"),
)
_BYE = (
    ("Bye!", "Bye! Come back soon!"),
    ("Goodbye!", "Goodbye! Have a nice day!"),
    ("Good night!", "Good night! Sleep well!"),
    ("See you later!", "See you later! Bye!"),
    ("bye", "Bye! Come back soon!"),
    ("I have to go now. Bye!", "Goodbye! It was nice to talk to you."),
)


def make_documents(corpus: Corpus, rng: random.Random) -> list[Document]:
    """An epoch: a conversation or two of every story, small talk, and plain text; in random order."""
    documents = [Document((), text) for text in corpus.fragments]
    for story in corpus.train:
        told = renamed(story, rng) if rng.random() < 0.5 else story
        documents.append(_document(told, corpus, rng))
    short = [s for s in corpus.train if len(s.text) < 700]
    for _ in range(len(corpus.train) // 16):
        first, second = rng.sample(short, 2)
        documents.append(two_stories(first, second, corpus, rng))
    documents += [small_talk(rng) for _ in range(len(corpus.train) // 12)]
    rng.shuffle(documents)
    return documents


def _document(story: Story, corpus: Corpus, rng: random.Random) -> Document:
    kind = rng.random()
    if kind < 0.06:
        return Document((), story.text)
    if kind < 0.15:
        return continued(story, rng)
    if kind < 0.58:
        return Document(_with_system([*_told(story, corpus, rng)], rng))
    return talk(story, corpus, rng)


def asked_about(story: Story, corpus: Corpus, rng: random.Random) -> tuple[list[str], str]:
    """One to three things the story is about, and how to say them: `["dog", "Lily"]`, `a dog and Lily`."""
    # What comes late in a story would teach that a story need not begin with what was asked.
    beginning = story.text[: len(story.text) // 3].lower()
    early = [topic for topic in story.topics if re.search(rf"\b{topic}\b", beginning)] or story.topics[:1]
    things = rng.sample(early, min(len(early), rng.choice((1, 1, 2, 2, 2, 3))))
    said = [_with_article(thing, corpus) for thing in things]
    if story.names and (rng.random() < 0.35 or not said):
        name = rng.choice(story.names[:2])
        kind = "boy" if name in BOYS else "girl" if name in GIRLS else None
        named = kind and kind in story.text.lower() and rng.random() < 0.5
        place = rng.choice((0, 0, len(things)))
        things.insert(place, name)
        said.insert(place, f"a {kind} named {name}" if named else name)
        if named and kind in things:
            said.pop(things.index(kind))
            things.remove(kind)
    return things[:3], joined(said[:3])


def _with_article(noun: str, corpus: Corpus) -> str:
    return f"{corpus.articles.get(noun, '')} {noun}".strip()


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _turn(user: str, assistant: str) -> tuple[Message, Message]:
    return {"role": "user", "content": user}, {"role": "assistant", "content": assistant}


def _told(
    story: Story, corpus: Corpus, rng: random.Random, phrasings: Sequence[str] = _TELL
) -> tuple[Message, Message]:
    if not (story.topics or story.names) or (phrasings is _TELL and rng.random() < 0.05):
        return _turn(rng.choice(_TELL_ANY), story.text)
    things, said = asked_about(story, corpus, rng)
    user, assistant = _turn(rng.choice(phrasings).format(said), story.text)
    return user, {**assistant, "asked": tuple(things)}


def continued(story: Story, rng: random.Random) -> Document:
    """The user gives the first sentences, the reply is the rest."""
    ends = [m.end() for m in re.finditer(r'[.!?]"?(?=\s)', story.text) if m.end() < len(story.text) * 0.6]
    if not ends:
        return Document((), story.text)
    cut = rng.choice(ends[:5])
    beginning, rest = story.text[:cut], story.text[cut:].strip()
    return Document(_with_system([*_turn(rng.choice(_CONTINUE).format(beginning), rest)], rng))


def talk(story: Story, corpus: Corpus, rng: random.Random) -> Document:
    """Perhaps a greeting, a story, questions about it, perhaps thanks and goodbye."""
    messages: list[Message] = []
    if rng.random() < 0.35:
        messages += _turn(*rng.choice(_HELLO if rng.random() < 0.7 else _SELF))
    messages += _told(story, corpus, rng)
    questions = [q for q in (who(story, rng), what(story, corpus, rng), ending(story, rng)) if q is not None]
    for question in rng.sample(questions, min(len(questions), rng.choice((1, 1, 2)))):
        messages += _turn(*question)
    if rng.random() < 0.3:
        messages += _turn(*rng.choice(_THANKS))
    if rng.random() < 0.25:
        messages += _turn(*rng.choice(_BYE))
    return Document(_with_system(messages, rng))


def two_stories(first: Story, second: Story, corpus: Corpus, rng: random.Random) -> Document:
    """A story, and another one asked for after it."""
    messages = [*_told(first, corpus, rng), *_told(second, corpus, rng, _TELL_NEXT)]
    return Document(_with_system(messages, rng))


def small_talk(rng: random.Random) -> Document:
    """One to four turns without a story."""
    turns = [rng.choice(_HELLO)] if rng.random() < 0.6 else []
    turns += rng.sample(_SELF, rng.choice((1, 1, 2)))
    if rng.random() < 0.4:
        turns.append(rng.choice(_BYE))
    return Document(_with_system([message for turn in turns for message in _turn(*turn)], rng))


def who(story: Story, rng: random.Random) -> tuple[str, str] | None:
    """Who is in it: the names, or else the people and animals that occur twice or more."""
    people = list(story.names[:3]) or [f"a {being}" for being in story.beings[:2]]
    if not people:
        return None
    verb = "is" if len(people) == 1 else "are"
    text = f"{joined(people)} {verb} in the story."
    return rng.choice(_WHO), text[0].upper() + text[1:]


def what(story: Story, corpus: Corpus, rng: random.Random) -> tuple[str, str] | None:
    """What it is about: the first name or being, and the most telling noun."""
    people = story.names[:1] or tuple(f"a {being}" for being in story.beings[:1])
    things = [_with_article(t, corpus) for t in story.topics[:2] if t not in story.beings[:1]][:1]
    if not things:
        return None
    return rng.choice(_WHAT), f"It is about {joined([*people, *things])}."


def ending(story: Story, rng: random.Random) -> tuple[str, str] | None:
    """Its last sentence."""
    last = re.split(r"(?<=[.!?])\s+", story.text.replace("\n", " "))[-1]
    if '"' in last or not 20 < len(last) < 160 or last.lower().startswith("the end"):
        return None
    return rng.choice(_END), last


def renamed(story: Story, rng: random.Random) -> Story:
    """The story with some of its names exchanged for others of their kind that are not in it."""
    new: dict[str, str] = {}
    for name in story.names:
        pool = BOYS if name in BOYS else GIRLS if name in GIRLS else ()
        free = [n for n in pool if n not in new.values() and n not in story.text]
        if free and rng.random() < 0.8:
            new[name] = rng.choice(free)
    if not new:
        return story
    text = re.sub(rf"\b({'|'.join(new)})\b", lambda m: new[m[0]], story.text)
    return dataclasses.replace(story, text=text, names=tuple(new.get(name, name) for name in story.names))


def _with_system(messages: list[Message], rng: random.Random) -> tuple[Message, ...]:
    if rng.random() < 0.12:
        return ({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *messages)
    return tuple(messages)
