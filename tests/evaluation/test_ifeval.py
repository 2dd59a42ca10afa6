"""Every instruction of IFEval: a reply that follows it, and one that just does not."""

import json

import pytest

from jaxchat.evaluation.ifeval import INSTRUCTIONS, Instructions, language_of, relaxed, sentences

ENGLISH = "this is a plain sentence about the weather in the north of england, which is often wet"
CASES = {
    "keywords:existence": ({"keywords": ["Cat", "c++"]}, "A cat writes C++.", "A dog writes C++."),
    "keywords:frequency": (
        {"keyword": "cat", "frequency": 2, "relation": "at least"},
        "cat, Cat",
        "one cat",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "category", "my cat"),
    "keywords:letter_frequency": (
        {"letter": "A", "let_frequency": 2, "let_relation": "less than"},
        "a bee",
        "a bAt",
    ),
    "language:response_language": (
        {"language": "de"},
        "Das ist ein deutscher Satz über das Wetter.",
        ENGLISH,
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        "Mr. Smith paid 3.50 in the U.S. today. He left!",
        "One. Two? Three!",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "one two-three", "one two"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Cats"},
        'One.\n\n"cats, dogs"',
        "One.\n\nMy cats",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name], [address]", "[name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\np. s. more", "Bye. PS more"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n- two", "* one\n**two**\n"),
    "detectable_format:constrained_response": ({}, "Well. My answer is no.", "My answer is perhaps."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "PART", "num_sections": 2},
        "PART 1\none\nPART 2\ntwo",
        "PART 1\none\npart 2\ntwo",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', '{"a": [1}'),
    "detectable_format:title": ({}, "<<a song>>\nla", "<< >>\nla"),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\n******\none"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, "say it. It", "It: say it."),
    "startend:end_checker": ({"end_phrase": "That is all."}, 'Well. "That is ALL."', "That is all. Bye"),
    "startend:quotation": ({}, ' "all of it" ', '"all" of it'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A BIG-ONE here",
        "One BIG here",
    ),
    "change_case:english_capital": ({}, ENGLISH.upper(), ENGLISH.upper() + " no"),
    "change_case:english_lowercase": ({}, ENGLISH, ENGLISH.capitalize()),
    "punctuation:no_comma": ({}, "one; two", "one, two"),
}


def test_every_instruction_of_the_paper_has_a_case():
    assert CASES.keys() == INSTRUCTIONS.keys()
    assert len(CASES) == 25


@pytest.mark.parametrize("name", CASES)
def test_an_instruction_is_told_followed_from_not(name):
    arguments, good, bad = CASES[name]
    assert INSTRUCTIONS[name].arguments.keys() == arguments.keys()
    check = Instructions(((name, json.dumps(arguments)),))
    assert check(good)["prompt_strict"].value == 1
    assert check(bad)["prompt_strict"].value == 0
    assert check(" \n")["prompt_loose"].value == 0


def test_english_is_asked_for_where_capitals_are():
    check = Instructions((("change_case:english_capital", "{}"),))
    assert check("DAS IST EIN DEUTSCHER SATZ ÜBER DAS WETTER IM NORDEN.")["prompt_strict"].value == 0
    assert language_of("123") is None


def test_prompts_and_instructions_are_counted_apart():
    check = Instructions(
        (
            ("punctuation:no_comma", "{}"),
            ("startend:end_checker", '{"end_phrase": "bye"}'),
            ("detectable_format:title", "{}"),
        )
    )
    figures = check("Here it is:\none\nbye")
    assert figures["prompt_strict"] == (0, 1)
    assert figures["instruction_strict"] == (pytest.approx(2 / 3), 3)
    assert figures["instruction_loose"] == (pytest.approx(2 / 3), 3)
    loose = check("Here it is, then:\n<<a>> one **bye**")
    assert loose["instruction_strict"] == (pytest.approx(1 / 3), 3)
    assert loose["prompt_loose"] == (1, 1)


def test_a_loose_check_reads_eight_texts():
    assert relaxed("a*\nb\nc") == ["a*\nb\nc", "a\nb\nc", "b\nc", "b\nc", "a*\nb", "a\nb", "b", "b"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two? Three!", 3),
        ("Dr. A. Smith, e.g. at 3.14 p.m. today, left. He did", 2),
        ('"Stop!" he said. Then... nothing.', 4),
        ("no end", 1),
        ("", 0),
    ],
)
def test_sentences_end_where_people_end_them(text, count):
    assert len(sentences(text)) == count
