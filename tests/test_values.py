"""What people type as numbers, switches and choices, and the words about what is none."""

import numpy as np
import pytest

from jaxchat.errors import UsageError
from jaxchat.values import Range, check_number, read_choice, read_number, read_switch

ANY_INT, ANY_FLOAT = Range(int), Range(float)


@pytest.mark.parametrize(
    ("text", "limits", "value"),
    [
        ("40", ANY_INT, 40),
        ("-1", ANY_INT, -1),
        (" +7 ", ANY_INT, 7),
        ("4_096", ANY_INT, 4096),
        ("9" * 30, ANY_INT, int("9" * 30)),
        ("0.7", ANY_FLOAT, 0.7),
        (".5", ANY_FLOAT, 0.5),
        ("3.", ANY_FLOAT, 3.0),
        ("-1e-3", ANY_FLOAT, -0.001),
        ("7", ANY_FLOAT, 7.0),
    ],
)
def test_numbers(text, limits, value):
    assert read_number("--n", text, limits) == value


NO_NUMBERS = ["", " ", "x", "nan", "inf", "-inf", "1e400", "-1e999", "0x10", "٣", "²", "1 2", "0,5", "1__0"]
NO_NUMBERS += ["_1", "--1", "1e", "None", "true", "\x1b[2J"]


@pytest.mark.parametrize("text", [*NO_NUMBERS, "9" * 5000])
@pytest.mark.parametrize("kind", [int, float])
def test_what_is_no_number(text, kind):
    limits = Range(kind, high=10**300)
    with pytest.raises(UsageError) as caught:
        read_number("--n", text, limits)
    assert str(caught.value).startswith("--n is '")
    assert str(caught.value).endswith(f"; expected {limits.expected}")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["1e3", "1.5", "2.0"])
def test_what_is_no_whole_number(text):
    with pytest.raises(UsageError, match=rf"^--n is '{text}'; expected a whole number, 1 or more$"):
        read_number("--n", text, Range(int, 1))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Range(int, 0, 2**32 - 1), "a whole number, 0 to 4294967295"),
        (Range(int, 1), "a whole number, 1 or more"),
        (Range(float, high=0.5), "a number, at most 0.5"),
        (Range(float), "a number"),
        (Range(float, 0, 1, note="0 is off"), "a number, 0 to 1 (0 is off)"),
        (Range(float, 0, 1, words="a share"), "a share"),
    ],
)
def test_what_is_expected_in_words(limits, expected):
    assert limits.expected == expected


@pytest.mark.parametrize("value", [True, "1", None, 1.0, [1], float("nan"), 3, -1])
def test_values_that_are_no_number_of_a_range(value):
    with pytest.raises(UsageError, match=r"^top is .+; expected a whole number, 0 to 2$"):
        check_number("top", value, Range(int, 0, 2))


def test_numbers_of_numpy_are_numbers():
    check_number("top", np.int64(2), Range(int, 0, 2))
    check_number("p", np.float32(0.5), Range(float, 0, 1))


def test_switches_and_choices():
    assert [read_switch("-x", text) for text in ("on", "TRUE", "1", "yes")] == [True] * 4
    assert [read_switch("-x", text) for text in ("off", "False", "0", "no")] == [False] * 4
    with pytest.raises(UsageError, match=r"^-x is 'maybe'; expected on or off$"):
        read_switch("-x", "maybe")
    assert read_choice("-x", "b", ("a", "b")) == "b"
    with pytest.raises(UsageError, match=r"^-x is 'B'; expected a, b or c$"):
        read_choice("-x", "B", ("a", "b", "c"))
