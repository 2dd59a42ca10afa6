"""What a file says cannot move the cursor, nor fill the screen."""

import pytest

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.visible import MAX_MESSAGE, message, shown, visible

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f"


def test_control_characters_are_pictures_but_for_tabs_and_line_breaks():
    assert visible("a\tb\n\x1b[2J") == "a\tb\n␛[2J"
    assert all(char.isprintable() for char in visible(HOSTILE))


@pytest.mark.parametrize("kind", [JaxchatError, UsageError])
def test_an_error_can_be_printed_whoever_is_quoted_in_it(kind: type[JaxchatError]):
    text = str(kind(f"m.json: tensor {HOSTILE}: download it again"))
    assert text == f"m.json: tensor {visible(HOSTILE)}: download it again"


def test_of_a_long_message_beginning_and_advice_stay():
    text = message("m.json: " + "x" * 10**6 + "; download it again")
    assert text.startswith("m.json: x")
    assert text.endswith("; download it again")
    assert len(text) <= MAX_MESSAGE
    assert "[... 998,227 characters ...]" in text
    assert message("short") == "short"


def test_a_value_is_shown_in_some_hundred_characters():
    assert shown("abc") == "'abc'"
    for value in ("x" * 10**6, 10**4000, list(range(10**5)), {"a": ["b" * 500] * 500}, [[[[[[1]]]]]]):
        assert len(shown(value)) < 1000
