"""IFEval's instructions that a program can verify (arXiv 2311.07911), and whether a reply follows them.

An instruction is a row of `INSTRUCTIONS`. Two of the reference's helpers are replaced: its sentences are cut
by NLTK's trained model, ours by rules, and its words of capitals by NLTK's tokenizer, ours where blanks and
punctuation are. A letter such as `#` is counted, where the reference takes another at random. Languages are
told apart by langdetect (the extra `eval`), as there.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from jaxchat.evaluation.items import Figure

Relation = Literal["less than", "at least"]
Number = Annotated[int, msgspec.Meta(ge=0, le=10**6)]
Word = Annotated[str, msgspec.Meta(min_length=1, max_length=10**5)]
Words = Annotated[list[Word], msgspec.Meta(min_length=1)]


class Instruction(NamedTuple):
    """A kind of instruction.

    Attributes:
      follows: whether a reply that is not blank follows it, given what the prompt asks for.
      arguments: what it asks for, and of which type.
    """

    follows: Callable[..., bool]
    arguments: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Instructions:
    """What a prompt asks for, as (instruction, its arguments as JSON), and the check of a reply."""

    asked: tuple[tuple[str, str], ...]

    def __call__(self, reply: str) -> Mapping[str, Figure]:
        """See `Generation.check`."""
        strict = [self._followed(number, [reply]) for number in range(len(self.asked))]
        loose = [self._followed(number, relaxed(reply)) for number in range(len(self.asked))]
        count = len(self.asked)
        return {
            "prompt_strict": Figure(float(all(strict))),
            "instruction_strict": Figure(sum(strict) / count, count),
            "prompt_loose": Figure(float(all(loose))),
            "instruction_loose": Figure(sum(loose) / count, count),
        }

    def _followed(self, number: int, replies: Sequence[str]) -> bool:
        name, arguments = self.asked[number]
        follows = functools.partial(INSTRUCTIONS[name].follows, **json.loads(arguments))
        return any(bool(reply.strip()) and follows(reply) for reply in replies)


def relaxed(reply: str) -> list[str]:
    """A reply as it is, without its first or last line or both, and all that without asterisks."""
    lines = reply.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [text for one in (reply, *cut) for text in (one, one.replace("*", ""))]


# --- what instructions ask for


def _compare(found: int, relation: Relation, wanted: int) -> bool:
    return found < wanted if relation == "less than" else found >= wanted


def _count(pattern: str, reply: str) -> int:
    return len(re.findall(pattern, reply, flags=re.IGNORECASE))


def _keywords(reply: str, keywords: list[str]) -> bool:
    return all(_count(re.escape(word), reply) for word in keywords)


def _frequency(reply: str, keyword: str, frequency: int, relation: Relation) -> bool:
    return _compare(_count(re.escape(keyword.strip()), reply), relation, frequency)


def _forbidden(reply: str, forbidden_words: list[str]) -> bool:
    return not any(_count(rf"\b{re.escape(word)}\b", reply) for word in forbidden_words)


def _letters(reply: str, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    return _compare(reply.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _language(reply: str, language: str) -> bool:
    return language_of(reply) in (None, language)


def _sentences(reply: str, num_sentences: int, relation: Relation) -> bool:
    return _compare(len(sentences(reply)), relation, num_sentences)


def _paragraphs(reply: str, num_paragraphs: int) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", reply)
    blank = [not part.strip() for part in parts]
    return not any(blank[1:-1]) and len(parts) - sum(blank) == num_paragraphs


def _words(reply: str, num_words: int, relation: Relation) -> bool:
    return _compare(len(re.findall(r"\w+", reply)), relation, num_words)


def _first_word(reply: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = reply.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if not 1 <= nth_paragraph <= count or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"[.,?!'\"]", word.lower())[0] == first_word.lower()


def _placeholders(reply: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", reply)) >= num_placeholders


_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}


def _postscript(reply: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    return bool(_count(_POSTSCRIPTS.get(marker, re.escape(marker)), reply))


def _bullets(reply: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", reply, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", reply, flags=re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _constrained(reply: str) -> bool:
    return any(option in reply for option in _OPTIONS)


def _highlights(reply: str, num_highlights: int) -> bool:
    once = [part for part in re.findall(r"\*[^\n\*]*\*", reply) if part.strip("*").strip()]
    twice = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", reply) if part[2:-2].strip()]
    return len(once) + len(twice) >= num_highlights


def _sections(reply: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", reply)) >= num_sections


def _json(reply: str) -> bool:
    text = reply.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(opening)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(reply: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", reply))


def _two_responses(reply: str) -> bool:
    parts = [part.strip() for part in reply.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def _repeats_prompt(reply: str, prompt_to_repeat: str) -> bool:
    return reply.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(reply: str, end_phrase: str) -> bool:
    return reply.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(reply: str, capital_frequency: int, capital_relation: Relation) -> bool:
    words = re.findall(r"[\w'’-]+", reply)
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _english_capital(reply: str) -> bool:
    return reply.isupper() and _language(reply, "en")


def _english_lowercase(reply: str) -> bool:
    return reply.islower() and _language(reply, "en")


def _no_comma(reply: str) -> bool:
    return "," not in reply


def _quotation(reply: str) -> bool:
    text = reply.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


INSTRUCTIONS: Mapping[str, Instruction] = {
    "keywords:existence": Instruction(_keywords, {"keywords": Words}),
    "keywords:frequency": Instruction(
        _frequency, {"keyword": Word, "frequency": Number, "relation": Relation}
    ),
    "keywords:forbidden_words": Instruction(_forbidden, {"forbidden_words": Words}),
    "keywords:letter_frequency": Instruction(
        _letters, {"letter": Word, "let_frequency": Number, "let_relation": Relation}
    ),
    "language:response_language": Instruction(_language, {"language": Word}),
    "length_constraints:number_sentences": Instruction(
        _sentences, {"num_sentences": Number, "relation": Relation}
    ),
    "length_constraints:number_paragraphs": Instruction(_paragraphs, {"num_paragraphs": Number}),
    "length_constraints:number_words": Instruction(_words, {"num_words": Number, "relation": Relation}),
    "length_constraints:nth_paragraph_first_word": Instruction(
        _first_word, {"num_paragraphs": Number, "nth_paragraph": Number, "first_word": Word}
    ),
    "detectable_content:number_placeholders": Instruction(_placeholders, {"num_placeholders": Number}),
    "detectable_content:postscript": Instruction(_postscript, {"postscript_marker": Word}),
    "detectable_format:number_bullet_lists": Instruction(_bullets, {"num_bullets": Number}),
    "detectable_format:constrained_response": Instruction(_constrained),
    "detectable_format:number_highlighted_sections": Instruction(_highlights, {"num_highlights": Number}),
    "detectable_format:multiple_sections": Instruction(
        _sections, {"section_spliter": Word, "num_sections": Number}
    ),
    "detectable_format:json_format": Instruction(_json),
    "detectable_format:title": Instruction(_title),
    "combination:two_responses": Instruction(_two_responses),
    "combination:repeat_prompt": Instruction(_repeats_prompt, {"prompt_to_repeat": Word}),
    "startend:end_checker": Instruction(_ends, {"end_phrase": Word}),
    "startend:quotation": Instruction(_quotation),
    "change_case:capital_word_frequency": Instruction(
        _capital_words, {"capital_frequency": Number, "capital_relation": Relation}
    ),
    "change_case:english_capital": Instruction(_english_capital),
    "change_case:english_lowercase": Instruction(_english_lowercase),
    "punctuation:no_comma": Instruction(_no_comma),
}
"""All 25 of the paper, by the names of its data."""


# --- what texts are

_SHORTENED = (
    r"Mr|Mrs|Ms|Dr|Prof|Capt|Lt|St|Jr|Sr|Inc|Ltd|Co|vs|etc|e\.g|i\.e|cf|No|Fig|a\.m|p\.m|[A-Z](?:\.[A-Z])*"
)
_ENDS = re.compile(rf"(?<!\w)(?:{_SHORTENED})\.(?=\s+\w)|[.?!]+[\"'”’)\]*]*(?=\s|$)")


def sentences(text: str) -> list[str]:
    """The sentences of a text: what ends with `.`, `?` or `!`, but for abbreviations, and the rest."""
    found, start = [], 0
    for match in _ENDS.finditer(text):
        if match[0][0] in ".?!":
            found.append(text[start : match.end()].strip())
            start = match.end()
    return [one for one in (*found, text[start:].strip()) if one]


def language_of(text: str) -> str | None:
    """The language of a text, as ISO 639-1 has it; None where it cannot be told."""
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None
