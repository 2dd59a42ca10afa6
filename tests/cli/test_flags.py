"""Flags of every command, of every kind, given what none of them can be."""

import importlib

import pytest

from jaxchat.cli.flags import flag_fields, parse, read
from jaxchat.commands import COMMANDS
from jaxchat.errors import UsageError

ALL = {name: importlib.import_module(f"jaxchat.commands.{name}").COMMAND for name in COMMANDS}
FIELDS = [(name, field) for name, command in ALL.items() for field in flag_fields(command.request)]
NUMBERS = [(name, field) for name, field in FIELDS if field.type in (int, float)]
PATHS = [(name, field) for name, field in FIELDS if field.flag.value in ("DIR", "FILE")]
CHOICES = [(name, field) for name, field in FIELDS if field.flag.choices]
SWITCHES = [(name, field) for name, field in FIELDS if field.type is bool]


def complaint(command: str, *arguments: str) -> str:
    """What is wrong with a command line."""
    request = ALL[command].request
    with pytest.raises(UsageError) as caught:
        read(request, parse(flag_fields(request), ["", *arguments], ""))
    return str(caught.value)


def ids(value: object) -> str:
    return value.name if hasattr(value, "name") else str(value)


@pytest.mark.parametrize(("command", "field"), NUMBERS, ids=ids)
def test_every_number_says_what_it_is_and_what_was_expected(command, field):
    for text in ("random", "", "nan", "inf", "1e400", "9" * 5000, "0x1F", "1 2"):
        said = complaint(command, f"--{field.name}={text}")
        kind = "a whole number" if field.type is int else "a"
        assert said.startswith(f"--{field.name} is '{text[:20]}")
        assert f"; expected {kind}" in said
        assert len(said) < 250


@pytest.mark.parametrize(("command", "field"), PATHS, ids=ids)
def test_no_path_is_empty_or_longer_than_paths_can_be(command, field):
    name = f"--{field.name}"
    if not field.flag.or_none:
        assert complaint(command, f"{name}=").startswith(f"{name} is empty; give the name of a ")
    for text in ("a" * 300, "b/" * 5000):
        said = complaint(command, name, text)
        assert said.startswith(f"{name} is '{text[:20]}")
        assert len(said) < 250


@pytest.mark.parametrize(("command", "field"), CHOICES, ids=ids)
def test_every_choice_names_the_others(command, field):
    choices = field.flag.choices
    said = complaint(command, f"--{field.name}", "other")
    assert said == f"--{field.name} is 'other'; expected {', '.join(choices[:-1])} or {choices[-1]}"


@pytest.mark.parametrize(("command", "field"), SWITCHES, ids=ids)
def test_every_switch_is_on_or_off(command, field):
    assert complaint(command, f"--{field.name}=maybe") == f"--{field.name} is 'maybe'; expected on or off"


@pytest.mark.parametrize("flag", ["-p", "--prompt", "--seed"])
def test_a_flag_without_its_value_is_named(flag):
    full = "--prompt" if flag == "-p" else flag
    assert complaint("generate", flag) == f"{full} needs a value; --help shows examples"


def test_texts_are_utf8_whatever_the_locale(monkeypatch):
    bytes_kept = "Erzähl".encode().decode("ascii", "surrogateescape")  # as Python has it in the locale C
    monkeypatch.setattr("os.fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    request = ALL["generate"].request
    given = parse(flag_fields(request), ["", "-p", bytes_kept, "--stop", bytes_kept, "-m", bytes_kept], "")
    filled = read(request, given)
    assert (filled.prompt, filled.options.stop) == ("Erzähl", ("Erzähl",))
    assert filled.model == bytes_kept  # a name of a file may be any bytes
