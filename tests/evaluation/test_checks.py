"""Replies against answers: patterns, numbers and the probes of RYS."""

import math

import pytest

from jaxchat.evaluation.checks import Feelings, GradeSchoolMath, Match, NearNumber, last_number, normalized
from jaxchat.evaluation.items import Choice, Completion, Found, Request


def values(check, reply):
    return {name: figure.value for name, figure in check(reply).items()}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is $1,234.50.", "1234.5"),
        ("3 and then 4.", "4"),
        ("-7", "-7"),
        ("18.00 in all", "18"),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text_is_plain(text, number):
    assert last_number(text) == number


def test_answers_are_matched_strictly_and_leniently():
    assert normalized(" The  CAT. ") == "the cat"
    check = Match(("Paris", "the city of Paris"))
    assert values(check, " Paris\n") == {"exact": 1, "normalized": 1}
    assert values(check, "paris.") == {"exact": 0, "normalized": 1}
    assert values(check, "It is Paris") == {"exact": 0, "normalized": 0}
    assert values(Match(("42",)), "It is 42.0") == {"exact": 0, "normalized": 0, "number": 1}


def test_a_pattern_finds_the_answer_in_a_reply():
    check = Match(("B",), r"answer is \(?([A-D])|\[([A-D])\]")
    assert values(check, "The answer is A. No, the answer is (B).") == {
        "found": 1,
        "exact": 1,
        "normalized": 1,
    }
    assert values(check, "[B]")["exact"] == 1
    assert values(check, "B") == {"found": 0, "exact": 0, "normalized": 0}
    assert values(Match((), r"\d"), "a 1") == {"found": 1}


# What lm-evaluation-harness 0.4.13 gives for its gsm8k task (strict-match, flexible-extract).
@pytest.mark.parametrize(
    ("reply", "strict", "flexible"),
    [
        ("She makes $1,018.\n#### 1,018", 1, 1),
        ("so $1018.", 0, 1),
        ("#### 1018 apples, of 3", 1, 0),
        ("1018.0", 0, 0),
        ("", 0, 0),
    ],
)
def test_sums_are_checked_as_the_harness_checks_them(reply, strict, flexible):
    check = GradeSchoolMath("2 * 509 = <<2*509=1018>>1018\n#### 1,018")
    assert values(check, reply) == {"strict": strict, "flexible": flexible}


@pytest.mark.parametrize(
    ("reply", "partial"),
    [
        ("1234", 1),
        ("I guess 1,234", 1),
        ("1233", 1 - 1 / 1234),
        ("123", (1 - 4 / 1234) * 3 / 4),
        ("12340", 4 / 5),
        ("no", 0),
        ("-1234", 0),
        ("9" * 500, 0),
    ],
)
def test_a_guess_is_right_in_part(reply, partial):
    found = values(NearNumber(1234), reply)
    assert found["partial"] == pytest.approx(partial)
    assert found["exact"] == (partial == 1)


def test_feelings_are_scored_as_eq_bench_does():
    check = Feelings((("Smug", 0.0), ("Hopeful", 4.0), ("Sad", 6.0), ("Proud", 3.0)))
    right = "First pass scores:\nSmug: 0\nHopeful: 4\nSad: 6\nProud: 3"
    assert values(check, right) == {"eq_bench": 100, "parseable": 1}
    off = 6.5 / (1 + math.exp(-1.2 * (2 - 4))) + 9
    wrong = right.replace("Hopeful: 4", "Hopeful: 2").replace("Smug: 0", "Smug: 9")
    assert values(check, wrong)["eq_bench"] == pytest.approx(10 * (10 - 0.7477 * off))
    assert values(check, right.replace("Sad", "Mad")) == {"eq_bench": 0, "parseable": 0}


def test_a_choice_is_made_by_each_rule():
    item = Choice("x", tuple(Request("q", f" {text}") for text in ("é" * 4, "abcdefgh", "ab")), label=1)
    own = [Found(8, 2, False, 3), Found(9, 4, False), Found(7, 1, True)]
    free = [Found(7, 2, False), Found(20, 4, False), Found(10, 1, False)]
    found = item.outcome([*own, *free])
    # Per token 4, 2.25, 7; per character 2, 1.125, 3.5; per byte 1, 1.125, 3.5; beside nothing: -1, 11, 3.
    picked = {name: figure.value for name, figure in found.figures.items() if name.startswith("acc")}
    assert picked == {"acc": 0, "acc_per_token": 1, "acc_per_char": 1, "acc_per_byte": 0, "acc_uncond": 1}
    assert found.figures["probability"].value == pytest.approx(
        math.exp(-9) / sum(math.exp(-one.nats) for one in own)
    )
    assert found.figures["nats_per_token"] == (9 / 4, 4)
    assert found.figures["bits_per_byte"] == (pytest.approx(9 / math.log(2) / 8), 8)
    assert found.cut == 3
    assert found.detail["chosen"] == 2


def test_of_equal_choices_the_first_is_taken():
    for label, right in ((0, 1), (1, 0)):
        item = Choice("x", (Request("q", " a"), Request("q", " b")), label)
        assert item.outcome([Found(1, 1, True)] * 2).figures["acc"].value == right


def test_a_completion_is_right_if_it_is_greedy():
    found = Completion("x", Request("q", " word")).outcome(Found(6.0, 2, True))
    assert found.figures["acc"].value == 1
    assert found.figures["nats"] == (6, 1)
    assert found.figures["bits_per_byte_mean"] == (pytest.approx(1.5 / math.log(2)), 1)
