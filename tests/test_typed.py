"""Values from outside are of their type, or the message has place, value and what was expected."""

import dataclasses
import math
from typing import Annotated, Any

import msgspec
import pytest

from jaxchat.errors import JaxchatError
from jaxchat.typed import Count, Finite, checked


@dataclasses.dataclass(frozen=True)
class Band:
    name: Annotated[str, msgspec.Meta(min_length=1)]
    players: tuple[Count, ...]
    tempo: Finite = 120.0
    live: bool = False
    fees: dict[str, Count] = dataclasses.field(default_factory=dict)


GOOD: dict[str, Any] = {"name": "The Slots", "players": [4, 2]}


def band(**changes: Any) -> Band:
    return checked({**GOOD, **changes}, Band, where="band.json", advice="ask the band")


def test_what_is_right_becomes_an_instance_and_the_rest_is_left_out():
    assert band(tempo=90, groupies=7) == Band("The Slots", (4, 2), 90.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": 5}, "band.json: name is 5; expected a text; ask the band"),
        ({"name": ""}, "band.json: name is ''; expected a text of length >= 1"),
        ({"players": [4, -2]}, "band.json: players[1] is -2; expected a whole number >= 0"),
        ({"players": [4, 2.5]}, "band.json: players[1] is 2.5; expected a whole number"),
        (
            {"players": [2**40]},
            "band.json: players[0] is 1099511627776; expected a whole number <= 2147483647",
        ),
        ({"players": "all"}, "band.json: players is 'all'; expected a list"),
        ({"players": [True]}, "band.json: players[0] is True; expected a whole number"),
        ({"tempo": math.nan}, "band.json: tempo is nan; expected a number"),
        ({"tempo": math.inf}, "band.json: tempo is inf; expected a number <= 1e+30"),
        ({"tempo": 10**400}, "; number out of range"),
        ({"live": "false"}, "band.json: live is 'false'; expected true or false"),
        ({"live": 1}, "band.json: live is 1; expected true or false"),
        ({"fees": {"Bo": "x"}}, "band.json: fees[...] is not what it should be; expected a whole number"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_what_was_expected(changes: dict[str, Any], said: str):
    with pytest.raises(JaxchatError) as refusal:
        band(**changes)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"players": []}, "band.json: 'name' is missing; ask"),
        ([GOOD], "band.json is [{"),
        (None, "band.json is None; expected an object {...}; ask"),
        ("x" * 10**6, "expected an object"),
    ],
)
def test_what_is_no_such_thing_at_all(value: Any, said: str):
    with pytest.raises(JaxchatError) as refusal:
        checked(value, Band, where="band.json", advice="ask the band")
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_a_key_within_a_file_goes_on_with_its_own_place():
    with pytest.raises(JaxchatError, match=r"^band\.json: tour\[1\] is 'x'; expected a whole number"):
        checked([1, "x"], list[int], where="band.json: tour", advice="ask")
    with pytest.raises(JaxchatError, match=r"^band\.json: tour\.name is 5"):
        checked({**GOOD, "name": 5}, Band, where="band.json: tour", advice="ask")
