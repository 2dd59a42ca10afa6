"""The commands: what they print where, flags and exit codes, pipes, and every wrong input of generate."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Annotated, Literal

import pytest

import jaxchat
from jaxchat import demo, generate
from jaxchat.analysis import show
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.cli import command_line
from jaxchat.cli.command_line import Command, Conflict
from jaxchat.cli.flags import flag_fields, parse, read
from jaxchat.commands import COMMANDS
from jaxchat.commands.generate import COMMAND, GenerateRequest, advised
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.options import Flag, GenerateOptions, unescape
from tests.support.commands import environment, run_process
from tests.support.tiny_chat import write_tiny_chat

pytestmark = pytest.mark.usefixtures("quick_compilation")

ENDLESS = {"max_position_embeddings": 1 << 20}  # with --ignore_eos it generates until it is stopped
RATES = re.compile(
    r"prefill: \d+ tokens, [\d.]+ tokens/s; decode: \d+ tokens, [\d.]+ tokens/s; first token: [\d.]+ s"
)
COSTS = re.compile(r"load: [\d.]+ s; compile: [\d.]+ s \(not in the rates\); peak memory: [\d.]+ [MG]iB")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("model") / "tiny-chat", **ENDLESS)


@pytest.fixture
def copied(chat_model, tmp_path):
    """A copy of the model to damage."""
    return shutil.copytree(chat_model, tmp_path / "copy")


@pytest.fixture
def continue_text(commands, chat_model):
    """`continue_text(flags)`: the JSON object of a run of `generate`."""

    def run(*flags, **options):
        return json.loads(commands.output("generate", "-m", chat_model, "--json", *flags, **options))

    return run


# --- the program and its help


def test_help_lists_the_commands_and_version_prints_one(commands):
    text = commands.output("--help")
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")] == list(COMMANDS)
    for arguments in (("--version",), ("chat", "--version"), ("generate", "--version", "-p", "x")):
        assert commands.output(*arguments) == f"jaxchat {jaxchat.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no command: give one of chat, generate, models, "),
        (("plna",), "no command 'plna'; did you mean plan?"),
        (("frobnicate",), "no command 'frobnicate'; jaxchat --help lists them"),
        (("--layer_spec", "0"), "--layer_spec stands before a command"),
    ],
)
def test_without_a_command_it_says_what_is_missing(commands, arguments, message):
    assert commands.error(*arguments, code=2).startswith(message)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_flag_with_an_example_in_80_columns(commands, name):
    text = commands.output(name, "--help")
    assert text.startswith(f"usage: jaxchat {name} ")
    command = __import__(f"jaxchat.commands.{name}", fromlist=["COMMAND"]).COMMAND
    entries = re.split(r"\n  (?=-)", text.split(":\n  -")[0] + text[text.index(":\n  -") + 1 :])[1:]
    assert [re.search(r"--(\w+)", entry)[1] for entry in entries] == [
        field.name for group in _groups(command) for field in group
    ]
    assert all("e.g." in entry for entry in entries)
    assert max(map(len, text.splitlines())) <= 80
    assert commands.output(name, "-h") == text


def _groups(command):
    titles = dict.fromkeys(field.flag.group for field in command.fields)
    return [[field for field in command.fields if field.flag.group == title] for title in titles]


def test_help_show_and_plan_do_not_import_jax(chat_model):
    code = (
        "import sys; from jaxchat import __main__ as p; from jaxchat.commands import COMMANDS\n"
        "for name in COMMANDS: assert p.main(['', name, '-h']) == 0\n"
        "for name in ('show', 'plan'): assert p.main(['', name, '-m', sys.argv[1]]) == 0\n"
        "assert p.main(['', 'analyze', '-m', sys.argv[1]]) == p.main(['', 'chat', '-x']) == 2\n"
        "assert not {'jax', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(chat_model)], check=True, capture_output=True)


def test_every_module_of_old_is_the_command_of_its_name(commands, chat_model, capsys):
    shown = commands.output("show", "-m", chat_model)
    for arguments in (["-m", str(chat_model), "--show"], ["-m", str(chat_model), "--show", "--nojson"]):
        assert generate.main(["", *arguments]) == 0
        assert capsys.readouterr().out == shown
    for name in ("generate", "plan", "analyze"):
        module = __import__(f"jaxchat.{name}", fromlist=["main"])
        assert module.main(["", "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: python -m jaxchat.{name} ")


# --- flags come from dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    place: Annotated[str, Flag(help="Where", example="here", positional=True)]
    size: Annotated[int, Flag(help="How much", example="--size 3", low=1)]
    ways: Annotated[tuple[str, ...], Flag(help="How", example="--way a", name="way", many=True)] = ()
    kind: Annotated[Literal["a", "b"] | None, Flag(help="Which", example="--kind a")] = None
    options: GenerateOptions = dataclasses.field(default_factory=GenerateOptions)
    quiet: bool = True


def _read(*arguments):
    return read(_Request, parse(flag_fields(_Request), ["", *arguments], "too many"))


def test_a_dataclass_is_filled_from_its_flags_and_keeps_its_defaults():
    expected = _Request(
        place="x", size=2, ways=("c", "d"), kind="b", options=GenerateOptions(top_k=3, stop=("\n",))
    )
    assert (
        _read("--size", "2", "x", "--way=c", "--way", "d", "--kind=b", "-k", "3", "--stop", "\\n") == expected
    )
    assert _read("x", "--size", "1") == _Request(place="x", size=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "PLACE and --size must be given; --help shows examples"),
        (("x", "y", "--size", "1"), "unexpected argument 'y'; too many"),
        (("x", "--size", "0"), "--size is '0'; expected a whole number, "),
        (("x", "--size", "1", "--kind", "c"), "--kind is 'c'; expected a or b"),
        (("x", "--size", "1", "--way", "\udcff"), "--way is not UTF-8 text"),
    ],
)
def test_a_dataclass_is_not_filled_from_wrong_flags(arguments, message):
    with pytest.raises(UsageError) as caught:
        _read(*arguments)
    assert str(caught.value).startswith(message)


def test_a_field_or_rule_that_makes_no_flag_is_an_error_of_the_program_at_import():
    @dataclasses.dataclass
    class Odd:
        size: Annotated[complex, Flag(help="?", example="--size 1j")] = 0j

    with pytest.raises(TypeError, match="--size: no flag can be read as"):
        flag_fields(Odd)
    with pytest.raises(ValueError, match="no flags of _Request: sise"):
        Command(usage="", request=_Request, run=lambda *_: 0, conflicts=(Conflict("sise", "kind", ""),))


def test_without_a_model_it_is_the_one_in_the_box(chat_model, commands, monkeypatch):
    monkeypatch.setattr(demo, "path", lambda: chat_model)
    done = commands.output("generate", "-p", "hello", "--max_new_tokens", "1", "--json")
    assert json.loads(done)["model"] == "tiny-chat"


def test_dashes_in_flag_names_are_underscores_but_values_stay(commands, chat_model):
    arguments = ["--layer-spec=0,2", "--max-length", "10", "--hide-banner", "--prompt", "--top-k"]
    out = commands.output("generate", "-m", chat_model, "--show", *arguments)
    assert "layer plan  0,2\n" in out
    assert " at 10 tokens\n" in out


def _options(*arguments):
    given = parse(COMMAND.fields, ["", "-p", "y", *map(str, arguments)], "")
    request = read(GenerateRequest, given)
    return advised(request.options, ModelDirectory.at(request.model).recommended_sampling, given.names)


def test_sampling_that_is_not_asked_for_is_what_the_model_recommends(tmp_path):
    def options(*arguments):
        return _options("-m", tmp_path, *arguments)

    assert options() == GenerateOptions()
    config = tmp_path / "generation_config.json"
    config.write_text('{"do_sample": true, "temperature": 0.5, "top_k": 40, "max_new_tokens": 7}')
    assert options() == GenerateOptions(temperature=0.5, top_k=40)
    assert options("--top_k", "0", "-q", "0.9") == GenerateOptions(temperature=0.5, top_p=0.9)
    assert options("-t", "0").temperature == 0
    config.write_text('{"temperature": 0.5, "top_k": 40}')
    assert options() == GenerateOptions()
    assert options("-k", "-1") == options()


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("top_k", -1, 0),
        ("top_k", -7, 0),
        ("top_k", 40.0, 40),
        ("top_p", 1.5, 1.0),
        ("min_p", -0.1, 0.0),
        ("temperature", 0, 0.0),
        ("temperature", -0.5, None),
        ("top_k", 0.5, None),
        ("top_k", 2**40, None),
        ("top_p", 0, None),
        ("repetition_penalty", 0, None),
    ],
)
def test_a_recommendation_that_is_none_is_no_reason_not_to_run(name, value, meant, tmp_path, caplog):
    advice = {"do_sample": True, "temperature": 0.7, name: value}
    (tmp_path / "generation_config.json").write_text(json.dumps(advice))
    found = ModelDirectory.at(tmp_path).recommended_sampling
    assert found.get(name) == meant
    assert found.get("temperature") == (meant if name == "temperature" else 0.7)
    GenerateOptions(**found)
    says = rf"{tmp_path}/generation_config\.json: ignored: {name} is .*; expected an? "
    assert [bool(re.match(says, message)) for message in caplog.messages] == [True] * (meant is None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("top_k", True),
        ("top_p", [0.9]),
        ("min_p", float("nan")),
        ("repetition_penalty", float("inf")),
    ],
)
def test_a_recommendation_that_is_no_number_is_a_broken_file(name, value, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, name: value}))
    with pytest.raises(JaxchatError, match=rf"^{tmp_path}/generation_config\.json: {name} is .*number"):
        _ = ModelDirectory.at(tmp_path).recommended_sampling


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (r"a\nb\tc", "a\nb\tc"),
        (r"\\n", r"\n"),
        ("\\\\\\n", "\\\n"),
        (r"\e[0m \x41\101\0", "\x1b[0m AA\0"),
        (r"\u00e9 \U0001f999 \xc3\xa9 é", "é 🦙 é é"),
        ("C:\\dir \\", "C:\\dir \\"),
    ],
)
def test_c_escapes(given, meant):
    assert unescape(given, "--stop") == meant


@pytest.mark.parametrize("given", [r"\xff", r"\ud800", r"\U00110000"])
def test_c_escapes_that_are_no_text(given):
    with pytest.raises(UsageError, match=r"^--stop: .* is no UTF-8 text; write "):
        unescape(given, "--stop")


# --- one answer


def test_standard_output_is_the_text_and_standard_error_the_statistics_where_asked_for(chat_model, commands):
    flags = ("-m", chat_model, "-p", "hello", "--max_new_tokens", "8")
    done = run_process("jaxchat.generate", *flags, "--verbose")
    assert done.code == 0
    assert done.out.endswith("\n")
    assert "tokens/s" not in done.out
    rates, costs, seed = done.err.splitlines()
    assert RATES.fullmatch(rates)
    assert COSTS.fullmatch(costs)
    assert re.fullmatch(r"seed: \d+", seed)
    for more in ((), ("--quiet",)):
        assert commands("generate", *flags, *more) == (0, done.out, "")


def test_the_same_command_says_the_same_and_tells_its_seed(continue_text):
    flags = ("-p", "hello", "--max_new_tokens", "12", "-t", "1.5")
    one, again = continue_text(*flags), continue_text(*flags)
    assert (again["seed"], again["token_ids"]) == (one["seed"], one["token_ids"])
    other = continue_text(*flags, "--seed", one["seed"] + 1)
    assert other["token_ids"] != one["token_ids"]


def test_json_is_one_object_and_repeats_with_its_seed(continue_text):
    arguments = ("-p", "hello", "--max_new_tokens", "12", "-t", "1.5", "--seed")
    first, again, other = (continue_text(*arguments, seed) for seed in ("7", "7", "8"))
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]
    assert first["text"] == again["text"]
    assert len(first["token_ids"]) == len(first["logprobs"]) == 12
    assert first["finish_reason"] == "length"
    assert first["prompt_tokens"] == len("hello") + 4  # BOS, two roles and the end of a turn
    assert (first["model"], first["family"], first["format"]) == ("tiny-chat", "llama", "chat")
    assert (first["layer_spec"], first["seed"]) == ("all", 7)
    timings = first["timings"]
    assert timings["decode_tokens"] == 11
    assert timings["prefill_tokens"] == first["prompt_tokens"]
    assert timings["time_to_first_token"] >= timings["prefill_seconds"] > 0
    assert timings["peak_memory_bytes"] > 1 << 20
    assert timings["decode_tokens_per_second"] > 0


def test_a_prefix_opens_the_reply_and_its_reasoning_is_told_apart(chat_model, commands):
    prefix = r"Hm,\u0020so</think>Well,\n"
    flags = ["-m", chat_model, "-p", "hello", "--max_new_tokens", "2", "--thought_tags", "<think> </think>"]
    flags += ["--ai_prefix", "<think>" + prefix]
    answer = json.loads(commands.output("generate", *flags, "--json"))
    assert answer["reasoning"] == "Hm, so"
    assert answer["content"].startswith("Well,\n")
    assert answer["text"] == answer["reasoning"] + answer["content"]
    assert answer["ai_prefix"] == "<think>Hm, so</think>Well,\n"
    assert len(answer["token_ids"]) == 2  # those of the prefix were not drawn

    # Without a terminal the content alone is the output, and what the model thinks goes where statistics go.
    _, out, err = commands("generate", *flags)
    assert out == answer["content"] + "\n"
    assert err.startswith("Hm, so\n")


def test_a_session_goes_on_in_another_process_as_if_it_had_never_stopped(chat_model, commands, tmp_path):
    chat = jaxchat.load(chat_model).chat_session("be nice")
    expected = ["".join(chat.send(text, max_new_tokens=6)) for text in ("one", "two")]

    file = tmp_path / "talk.session"
    flags = ("-m", chat_model, "--max_new_tokens", 6, "--save_session", file)
    first = commands.output("generate", *flags, "-p", "one", "-s", "be nice")
    second = run_process("jaxchat", "generate", *flags, "-p", "two", "--load_session", file).out
    assert [first, second] == [text + "\n" for text in expected]

    flags = ("generate", "-m", chat_model, "-p", "x", "--load_session")
    assert "made under the layer plan all, this is 2::-1" in commands.error(
        *flags, file, "--layer_spec=::-1", code=2
    )
    assert "no such file" in commands.error(*flags, tmp_path / "none", code=2)


def test_a_layer_plan_changes_the_output_and_the_parameter_count(continue_text):
    arguments = ("-p", "hello", "--max_new_tokens", "12", "--layer-spec")
    plain, same, reversed_ = (continue_text(*arguments, spec) for spec in ("all", "0:3", "::-1"))
    assert plain["token_ids"] == same["token_ids"] != reversed_["token_ids"]
    assert plain["parameters"] == reversed_["parameters"]


def test_a_prompt_from_standard_input_equals_one_on_the_command_line(continue_text):
    arguments = ("--max_new_tokens", "8", "--format", "completion")
    given = continue_text(*arguments, "-p", "höla\n")
    for flags in (("--prompt_file", "-"), ("-p", "-"), ()):
        assert continue_text(*arguments, *flags, stdin="höla\n\n")["text"] == given["text"]
    assert continue_text(*arguments, "-p", "höla\n", stdin="not this")["text"] == given["text"]


def test_a_model_without_a_template_continues_the_prompt_and_says_so(tmp_path, commands):
    model = write_tiny_chat(tmp_path / "m", template=None, **ENDLESS)
    _, out, err = commands("generate", "-m", model, "-p", "hello", "--max_new_tokens", "4", "--json")
    assert json.loads(out)["format"] == "completion"
    assert err.splitlines() == [
        "jaxchat: this model has no chat template: the prompt is continued as text (--format completion)"
    ]


def test_special_tokens_of_a_prompt_are_parsed_in_completions(chat_model, continue_text, commands):
    raw = ("-p", "<|user|>hi</s><|assistant|>", "--max_new_tokens", "3")
    completion = ("--format", "completion")
    assert continue_text(*raw, *completion)["prompt_tokens"] == 5
    assert continue_text(*raw, *completion, "--nospecial_tokens")["prompt_tokens"] == len(raw[1])
    for flag in ("--special_tokens", "--nospecial_tokens"):
        message = commands.error("generate", "-m", chat_model, *raw, flag, code=2)
        assert message.startswith("--special_tokens is for --format completion")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"chat_template.jinja": "{% if %}"}, r"chat_template\.jinja: broken chat template \(line 1"),
        ({"additional_chat_templates/rag.jinja": ""}, r"no chat template named 'default' \(found: rag\)"),
        ({"chat_template.json": "[]"}, r"chat_template\.json: expected a JSON object"),
    ],
)
def test_a_broken_template_is_in_the_way_of_chats_only(files, says, tmp_path, commands):
    write_tiny_chat(tmp_path, template=None)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    asked = ("generate", "-m", tmp_path, "-p", "hi", "--max_new_tokens", "2")
    assert re.search(says, commands.error(*asked, code=1))
    commands.output(*asked, "--format", "completion")
    commands.output("show", "-m", tmp_path)


def test_a_full_context_is_never_silent(chat_model, commands):
    done = commands("generate", "-m", chat_model, "-p", "hello", "--max_length", "90", "--ignore_eos")
    assert "jaxchat: the context of 90 tokens is full; raise --max_length" in done.err


def test_show_as_json(chat_model, commands):
    for command in (("show",), ("generate", "--show")):
        out = commands.output(*command, "-m", chat_model, "--json", "--layer_spec", "0,0")
        assert json.loads(out)["layer_spec"] == "0,0"


# --- wrong usage: exit code 2 and one line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do: give a prompt with -p or --prompt_file"),
        (("-p", "-"), "--prompt -: the prompt is empty"),
        (("-i", "-p", "-"), "--interactive reads messages from standard input"),
        (("-p", "x", "--quiet", "--verbose"), "--quiet cannot be combined with --verbose"),
        (("-p", "x", "--save_session", "/no/such/a.session"), "/no/such/a.session: the session cannot be "),
        (("-p", "x", "--load_session", "never"), "no session is saved as never; "),
        (("-p", "x", "--load_session", "a/never"), "a/never: no such file"),
        (("--temp", "0.5"), "unknown flag --temp; jaxchat calls it --temperature"),
        (("--n-predict", "9"), "unknown flag --n-predict; jaxchat calls it --max_new_tokens"),
        (("-n", "9"), "unknown flag -n; jaxchat calls it --max_new_tokens"),
        (("-c=9",), "unknown flag -c; jaxchat calls it --max_length"),
        (("--ctx-size", "9"), "unknown flag --ctx-size; jaxchat calls it --max_length"),
        (("-ngl", "9"), "unknown flag -ngl; all layers are on one device"),
        (("--threads", "4"), "unknown flag --threads; all cores are used; `taskset"),
        (("--device", "cpu"), "unknown flag --device; JAX chooses the device; JAX_PLATFORMS=cpu"),
        (("--max-new", "4"), "unknown flag --max-new; did you mean --max_new_tokens?"),
        (("--quant_format", "int4"), "unknown flag --quant_format; --help lists the flags"),
        (("--layer_spce", "0:2"), "unknown flag --layer_spce; did you mean --layer_spec?"),
        (("--frobnicate",), "unknown flag --frobnicate; --help lists the flags"),
        (("-m", "nowhere", "-p", "x"), "nowhere: no such model directory"),
        (("-m", "nowhere", "--show"), "nowhere: no such model directory"),
        (("-m", "MODEL"), "nothing to do: give a prompt with -p or --prompt_file"),
        (("-m", "MODEL", "-p", ""), "--prompt: the prompt is empty"),
        (("-m", "MODEL", "-p", "x", "--prompt_file", "f"), "--prompt cannot be combined with --prompt_file"),
        (("-m", "MODEL", "--prompt_file", "nowhere"), "--prompt_file nowhere: No such file"),
        (("-m", "MODEL", "-p", "\udcff"), "--prompt is not UTF-8 text"),
        (("-m", "MODEL", "-p", "two", "words"), "unexpected argument 'words'; give the prompt in quotes"),
        (
            ("-m", "MODEL", "-p", "x", "--max_new_tokens", "0"),
            "--max_new_tokens is '0'; expected a whole",
        ),
        (("-m", "MODEL", "-p", "x", "-t", "warm"), "--temperature is 'warm'; expected a number, 0"),
        (
            ("-m", "MODEL", "-p", "x", "--seed", "-1"),
            "--seed is '-1'; expected a whole number, 0 to",
        ),
        (
            ("-m", "MODEL", "-p", "x", "--dtype", "int3"),
            "--dtype is 'int3'; expected float32, bfl",
        ),
        (("-m", "MODEL", "-i", "--json"), "--interactive cannot be combined with --json: "),
        (("-m", "MODEL", "-p", "x", "--json", "--markdown"), "--markdown cannot be combined with --json: "),
        (("-m", "MODEL", "-p", "x", "--reversed_role"), "--reversed_role needs --interactive: "),
        (
            ("-m", "MODEL", "-p", "x", "--ai_prefix_every_turn"),
            "--ai_prefix_every_turn needs --interactive: ",
        ),
        (
            ("-m", "MODEL", "-p", "x", "--ai_prefix_in", "content"),
            "--ai_prefix_in needs --ai_prefix or --int",
        ),
        (("-m", "MODEL", "-p", "x", "--history_file", "f"), "--history_file needs --interactive: "),
        (
            ("-m", "MODEL", "-i", "--load_session", "f", "-s", "x"),
            "--load_session cannot be combined with --sys",
        ),
        (("-m", "MODEL", "-i", "--ai_prefix", "x", "--format", "completion"), "--ai_prefix needs a chat; "),
        (("-m", "MODEL", "-p", "x", "--ai_prefix", r"\xff"), "--ai_prefix: "),
        (("-m", "MODEL", "-p", "x", "--thought_tags", "<think>"), "--thought_tags is '<think>'; give two "),
        (
            ("-m", "MODEL", "-p", "x", "--ai_prefix_in", "answer"),
            "--ai_prefix_in is 'answer'; expected content or reasoning",
        ),
        (("-m", "MODEL", "-p", "x", "-s", "y", "--format", "completion"), "--system needs a chat"),
        (("-m", "MODEL", "-p", "x", "-q", "1.5"), "--top_p is '1.5'; expected a number above 0, at most 1"),
        (("-m", "MODEL", "-p", "x", "--keep_identity"), "--keep_identity needs --recipe: "),
    ],
)
def test_wrong_usage(chat_model, commands, arguments, message):
    words = [str(chat_model) if argument == "MODEL" else argument for argument in arguments]
    assert commands.error("generate", *words, code=2).startswith(message)


def test_a_bad_plan_is_underlined(chat_model):
    done = run_process("jaxchat", "generate", "-m", chat_model, "-p", "x", "--layer_spec", "0:2,9")
    assert (done.code, done.out) == (2, "")
    line, spec, caret = done.err.splitlines()
    assert line == "jaxchat: error: layer 9 is out of range: the model has 3 layers, expected -3 to 2"
    assert (spec, caret) == ("0:2,9", "    ^")


def test_a_prompt_file_that_is_not_utf8(chat_model, tmp_path, commands):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"good\xe9bad")
    message = commands.error("generate", "-m", chat_model, "--prompt_file", path, code=2)
    assert f"{path}: not UTF-8 text: byte 0xe9 at offset 4" in message


def test_an_unknown_family(copied, commands):
    (copied / "config.json").write_text('{"model_type": "rwkv"}')
    message = commands.error("generate", "-m", copied, "-p", "x", code=2)
    assert "model_type 'rwkv' is not supported; supported: " in message
    assert "llama" in message


def test_a_corrupt_configuration(copied, commands):
    (copied / "config.json").write_text('{"model_type": ')
    assert "config.json: not readable as JSON" in commands.error("generate", "-m", copied, "-p", "x", code=1)


# --- wrong input that shows later


def test_a_prompt_longer_than_the_context(chat_model, commands):
    message = commands.error("generate", "-m", chat_model, "-p", "much too long", "--max_length", "8", code=2)
    assert "17 tokens, too many for the context of 8" in message


def test_truncated_weights(copied, commands):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in commands.error("generate", "-m", copied, "-p", "x", code=1)


def test_weights_of_another_shape(copied, commands):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    message = commands.error("generate", "-m", copied, "-p", "x", code=1)
    assert "mlp.gate_proj.weight: expected [48, 24], found [44, 24]" in message
    assert "mlp.down_proj.weight: expected [24, 48], found [24, 44]" in message


def test_a_model_without_a_tokenizer(copied, commands):
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer_config.json").unlink()
    assert "no tokenizer" in commands("generate", "-m", copied, "-p", "x").err


def test_an_internal_error_is_one_line_and_debug_shows_where(chat_model, capsys, monkeypatch):
    monkeypatch.setattr(show, "describe_directory", lambda *_, **__: 1 / 0)
    arguments = ["", "-m", str(chat_model), "--show"]
    assert generate.main(arguments) == 1
    line = capsys.readouterr().err
    assert line.startswith(
        "jaxchat: internal error: ZeroDivisionError: division by zero; run again with --log"
    )
    assert line.count("\n") == 1
    assert generate.main([*arguments, "--log_level", "debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


# --- pipes

GENERATE = [sys.executable, "-m", "jaxchat.generate"]


def test_a_reader_that_leaves_ends_the_program_quietly(chat_model):
    process = subprocess.Popen(
        [*GENERATE, "-m", chat_model, "-p", "hello", "--ignore_eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == command_line.BROKEN_PIPE == 141


def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*GENERATE, "-h"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"jaxchat: error: input or output: No space left on device\n"


def test_chat_from_a_pipe_prints_replies_only_and_survives_errors(chat_model, commands):
    messages = ["hello", "", "/plan ::-1", "/nonsense", "x" * 100, "/plan 7", "//hello", "/stats", "/restart"]
    flags = ("-m", chat_model, "--max_new_tokens", "4", "--max_length", "90")
    stdin = "\n".join([*messages, "hello"]) + "\n"
    _, out, err = commands("chat", *flags, stdin=stdin)
    errors = [line for line in err.splitlines() if line.startswith("jaxchat: error: ")]
    expected = ("no command /nonsense", "too many for the context of 90", "layer 7 is out of range")
    assert len(errors) == 3
    assert all(part in error for part, error in zip(expected, errors, strict=True))
    assert "layer plan 2::-1: 3 slots, " in err
    assert "You" not in out
    assert len(RATES.findall(err)) == 1
    assert "--" not in "".join(errors)  # advice for the command line
    assert len(RATES.findall(commands("generate", "-i", *flags, "--verbose", stdin=stdin).err)) == 2
    assert commands.output("generate", "-i", *flags, stdin=stdin) == out


# --- Ctrl-C without a terminal; with one: test_terminal.py


def test_an_interrupt_without_a_terminal_ends_with_130_and_one_line_break(chat_model):
    process = subprocess.Popen(
        [*GENERATE, "-m", chat_model, "-p", "hello", "--ignore_eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    process.stdout.read(1)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert out.endswith(b"\n")
