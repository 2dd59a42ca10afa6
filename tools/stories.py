"""The TinyStories corpora as a list of clean stories, and what a script can know of one: names and topics.

`dialogues.py` makes conversations of them, `train_demo.py` trains on these.
"""

import collections
import dataclasses
import hashlib
import math
import re
from pathlib import Path

from jaxchat.errors import UsageError

CASED = "tinystories_2MiB.txt"
LOWERED = "tinystories_4MB_lowercased.txt"
"""Its first half is the cased file's text; a story ends with a single line break, a paragraph with two."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_LEAST, _MOST = 280, 1700
"""Characters of a usable story: shorter ones are fragments, longer ones do not fit a conversation."""
_HELD_OUT = 32
"""One story in so many is never trained on."""

BOYS = _words(
    "Ben Tom Timmy Jack Tim Sam Max John Bob Joe Billy Tommy Andy Benny Jake Jimmy Jim James Sammy Dave "
    "Danny Henry Pete Bobby Frank Peter Gary Jerry Leo George Joey Bill Ted Fred Charlie Mike Toby Oliver "
    "Matt Patrick Charles Tony Steve Paul Ryan Harry Martin Nick Adam Eric Luke Dan"
)
GIRLS = _words(
    "Lily Mia Anna Lucy Sarah Jane Sara Sue Daisy Molly Jill Lila Sally Mary Amy Jen Grace Emma Jenny Elly "
    "Emily Susie Bella Cindy Polly Rosie Lisa Lola Ella Sophie Lulu Luna Kate Lizzie Alice Chloe Julie "
    "Rachel Claire Millie Ruby Clara Abby Stella Nora Nancy Ellie Annie Mandy Zoe Eva Maya"
)
"""Names that are exchanged for others of their kind, so that the name asked for becomes the story's."""

_FAMILY = _words("mom mommy mum mummy mama dad daddy papa grandma grandpa granny")
_PROPER = _words("monday tuesday wednesday thursday friday saturday sunday christmas halloween santa")
_OWNERS = frozenset(_words("his her their my your our the a an this that little one new old and's"))
_SPEECH = frozenset(
    _words(
        "said asked cried shouted replied yelled called whispered exclaimed says asks answered laughed "
        "smiled added thought screamed agreed sang begged"
    )
)
_START = re.compile(
    r"once|one (\w+ )?(day|night|morning|evening|afternoon)|there (was|were|once|lived)|in an? |it was|"
    r"long ago|a (little|long|small|big)|\w+ (and \w+ )?(was|were|is|are|like|likes|liked|love|loves|loved|"
    r"had|have|has|went|lived|wanted|want|wants)\b"
)


@dataclasses.dataclass(frozen=True)
class Story:
    """A clean story.

    Attributes:
      text: paragraphs separated by one line break.
      names: whom it is about: capitalised words that are names, the most frequent first.
      topics: nouns it is about, the most telling first.
      beings: nouns of people and animals in it (`girl`, `bear`), the most frequent first.
    """

    text: str
    names: tuple[str, ...]
    topics: tuple[str, ...]
    beings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All stories, and what was learnt from them together.

    Attributes:
      train, held_out: disjoint; no story of one is in the other.
      fragments: other clean text: parts of stories, and stories too long for a conversation.
      articles: noun -> `a`, `an`, or `` for plurals and what is not counted.
    """

    train: tuple[Story, ...]
    held_out: tuple[Story, ...]
    fragments: tuple[str, ...]
    articles: dict[str, str]


def read_corpus(directory: Path) -> Corpus:
    """The stories of both files of a directory.

    Raises:
      UsageError: a file is missing.
    """
    cased = [clean(text) for text in _read(directory / CASED).split("<|endoftext|>")]
    lowered = _read(directory / LOWERED)
    lowered = lowered[_end_of_overlap(lowered, cased[-2]) :]
    pieces = [clean(piece.replace("\n\n", "\n")) for piece in re.split(r"(?<!\n)\n(?!\n)", lowered)]
    restore = CaseRestorer([text for text in cased if text])
    found = [(True, text) for text in cased[:-1]]
    found += [(bool(_START.match(piece)), restore(piece)) for piece in pieces]
    texts = list({_key(text): text for whole, text in found if whole and _usable(text)}.values())
    fragments = {text for whole, text in found if _readable(text) and not (whole and _usable(text))}
    return _analysed(texts, sorted(fragments))


def clean(text: str) -> str:
    """Straight quotes, no doubled spaces, one line break between paragraphs."""
    for wrong, right in (
        ("â€™", "'"), ("â€˜", "'"), ("â€œ", '"'), ("â€\x9d", '"'), ("â€“", "-"), ("â€”", "-"), ("â€¦", "..."),
        ("’", "'"), ("‘", "'"), ("“", '"'), ("”", '"'), ("–", "-"), ("—", " - "), ("…", "..."),
    ):  # fmt: skip
        text = text.replace(wrong, right)
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return "\n".join(line for line in lines if line)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; --data is the folder of {CASED} and {LOWERED}") from None


def _key(text: str) -> str:
    return " ".join(text.lower().split())


def _end_of_overlap(lowered: str, last: str) -> int:
    """Where the lowered file goes on beyond the cased file's last whole story."""
    ending = last.lower().split("\n")[-1]
    found = lowered.find(ending)
    return 0 if found < 0 else found + len(ending)


def _usable(text: str) -> bool:
    return (
        _LEAST <= len(text) <= _MOST
        and _readable(text)
        and text[0] != '"'
        and text[-1] in '.!?"'
        and text.count('"') % 2 == 0
    )


def _readable(text: str) -> bool:
    return len(text) >= 100 and text.isascii() and not re.search(r"[<>|\\$#*_\[\]{}=/]", text)


class CaseRestorer:
    """Gives lower-cased text its capitals, as learnt from cased text."""

    def __init__(self, cased: list[str]):
        everything = "\n".join(cased)
        self._lower = collections.Counter(re.findall(r"(?<![A-Za-z'])[a-z]+", everything))
        inside = collections.Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", everything))
        self._names = {
            name.lower() for name, count in inside.items() if count >= 2 and not self._lower[name.lower()]
        } | {name.lower() for name in BOYS + GIRLS if self._lower[name.lower()] < 5}
        self._after_quote = collections.Counter(
            (first.lower(), second, first[0].isupper())
            for first, second in re.findall(r'[.!?]" ([A-Za-z]+) ([a-z]+)', everything)
        )

    def __call__(self, text: str) -> str:
        """The text with capitals where sentences, speech and names begin, and in I."""
        return "\n".join(self._paragraph(line, self._names_of(text)) for line in text.split("\n"))

    def _names_of(self, text: str) -> set[str]:
        """Known names, and words that this story introduces as a name or that no cased story has."""
        found = {w for w in re.findall(r"[a-z]+", text) if w in self._names or w in _PROPER}
        introduced = re.findall(r"(?:named|name is|name was|called|i am|i'm) ([a-z]+)\b(?! [a-z]+ly\b)", text)
        return found | {
            w for w in introduced if self._lower[w] < 80 and w not in _SPEECH and text.count(w) > 2
        }

    def _paragraph(self, text: str, names: set[str]) -> str:
        out, inside, starts, previous = [], False, True, ""
        tokens = re.findall(r"[a-z]+|[^a-z]", text)
        words = [t for t in tokens if t.isalpha()]
        at = 0
        for place, token in enumerate(tokens):
            if token.isalpha():
                following = words[at + 1] if at + 1 < len(words) else ""
                contracted = place > 1 and tokens[place - 1] == "'" and tokens[place - 2].isalpha()
                owned = previous in _OWNERS or (previous == "s" and tokens[place - 2] != '"')
                capital = (
                    (starts and not contracted)
                    or (token == "i" and not contracted)
                    or (token in names and not contracted)
                    or (token in ("mr", "mrs") and following != "")
                    or (token in _FAMILY and not owned)
                )
                out.append(token.capitalize() if capital else token)
                previous, starts, at = token, False, at + 1
                continue
            if token == '"':
                inside = not inside
                ended = tokens[place - 1] if place else ""
                starts = inside or (ended in (".", "!", "?") and self._new_sentence(words, at, ended))
            elif token in ".!?":
                starts = True
            out.append(token)
        return "".join(out)

    def _new_sentence(self, words: list[str], at: int, ended: str) -> bool:
        """Whether what follows a closing quote begins a sentence, and is not `said Tim`."""
        if ended == ".":
            return True
        first, second = (*words[at : at + 2], "", "")[:2]
        upper, lower = (self._after_quote[first, second, capital] for capital in (True, False))
        if upper != lower:
            return upper > lower
        return first not in _SPEECH and second not in _SPEECH


# --- what a story is about --------------------------------------------------------------------------------

_GENERIC = frozenset(
    _words(
        "day time thing things way lot bit idea story moral end morning night side one other others "
        "people name fun mom dad mommy daddy mum mummy mama papa parents something everything lesson rest "
        "top middle front back kind job part place piece world life eyes eye hand hands face head arms "
        "arm leg legs heart voice words word hug smile turn help moment while minute hour hours days week "
        "year years owner children kids lots sound noise question answer problem friendship ground floor "
        "air room corner same best next first last more most much big little small good new old very two "
        "three too many well right left hard own love times minutes moments distance group breath ending "
        "clearing fastest request pieces lit mind feet foot mouth body hair nose ears bottom line edge "
        "step secret look new special"
    )
)
_BEINGS = frozenset(
    _words(
        "girl boy dog cat bird bear rabbit bunny fox frog fish mouse lion tiger elephant monkey duck cow "
        "pig horse sheep goat turtle squirrel owl bee ant spider butterfly snake wolf deer dragon "
        "princess prince king queen fairy witch wizard farmer teacher doctor man woman lady baby brother "
        "sister puppy kitten chicken hen crab whale shark dolphin octopus penguin robot bug worm snail "
        "ladybug zebra giraffe panda koala crocodile alligator hippo raccoon hedgehog mole bat crow "
        "parrot eagle goose swan kangaroo donkey pony unicorn monster ghost giant elf mermaid pirate "
        "clown policeman captain soldier knight"
    )
)
_BOUNDARY = (
    r"(?=[.,!?;:]| (?:and|was|were|is|in|on|with|to|that|who|had|of|for|could|said|from|at|named|called|"
    r"did|but|so|because|would|when|looked|went|came|then|he|she|they|into|by|under|up|as|saw)\b)"
)
_NOUN_USE = re.compile(
    rf"\b(a|an|the|his|her|their|my|your|some|this|that|these) (?:[a-z]+ )?([a-z]{{3,}}){_BOUNDARY}"
)

_COUNTED_USE = re.compile(rf"\b(an?|some) (?!little|bit)(?:[a-z]+ )?([a-z]{{3,}}){_BOUNDARY}")


def _analysed(texts: list[str], fragments: list[str]) -> Corpus:
    lowered = [text.lower() for text in texts]
    total = collections.Counter(word for text in lowered for word in re.findall(r"[a-z]{3,}", text))
    as_noun: collections.Counter[str] = collections.Counter()
    with_article: collections.Counter[tuple[str, str]] = collections.Counter()
    for text in lowered:
        as_noun.update(word for _, word in _NOUN_USE.findall(text))
        with_article.update((word, article) for article, word in _COUNTED_USE.findall(text))
    nouns = {w for w, n in as_noun.items() if n >= 5 and n / total[w] > _noun_share(w) and w not in _GENERIC}
    documents = collections.Counter(w for text in lowered for w in set(re.findall(r"[a-z]+", text)) & nouns)
    weight = {w: math.log(len(texts) / documents[w]) for w in nouns}
    articles = {w: _article(w, with_article, total) for w in nouns}
    train = tuple(_story(text, weight) for text in texts if not _held_out(text))
    held_out = tuple(_story(text, weight) for text in texts if _held_out(text))
    return Corpus(train, held_out, tuple(fragments), articles)


def _noun_share(word: str) -> float:
    """The share of noun uses that makes a word a noun; with the ending of a verb or adverb it needs more."""
    return 0.5 if word.endswith(("ing", "ly", "est")) or (word.endswith("ed") and len(word) > 5) else 0.3


def _article(word: str, used: collections.Counter[tuple[str, str]], total: collections.Counter[str]) -> str:
    plural = word.endswith("s") and not word.endswith("ss") and total[word[:-1]] > 0
    single = used[word, "a"] + used[word, "an"]
    uncounted = used[word, "some"] > single or (single == 0 and total[word + "s"] == 0)
    if plural or uncounted:
        return ""
    return "an" if word[0] in "aeiou" and word not in ("unicorn", "uniform") else "a"


def _held_out(text: str) -> bool:
    return int(hashlib.sha256(_key(text).encode()).hexdigest(), 16) % _HELD_OUT == 0


def _story(text: str, weight: dict[str, float]) -> Story:
    counts = collections.Counter(re.findall(r"[a-z]+", text.lower()))
    beings = [w for w, n in counts.most_common() if w in _BEINGS and n >= 2]
    topics = sorted((w for w in counts if w in weight), key=lambda w: -(counts[w] ** 0.7) * weight[w])
    return Story(text, tuple(_names(text)), tuple(topics[:6]), tuple(beings))


def _names(text: str) -> list[str]:
    """Capitalised words inside sentences that the story never writes small, by how often they occur."""
    inside = re.findall(r"(?<=[a-z,] )([A-Z][a-z]+)\b(?!')", text)
    small = set(re.findall(r"\b[a-z]+\b", text))
    excluded = {w.capitalize() for w in (*_FAMILY, *_PROPER, "mr", "mrs", "miss", "i", "once", "god", "the")}
    counts = collections.Counter(re.findall(r"\b[A-Z][a-z]+\b", text))
    names = {w for w in inside if w not in excluded and w.lower() not in small and len(w) > 1}
    return sorted((w for w in counts if w in names and counts[w] >= 2), key=lambda w: -counts[w])
