"""The command line as a process: what it prints where, its exit codes, pipes, and every wrong input."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import jaxchat
from jaxchat import generate
from jaxchat.cli import command_line
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.options import unescape
from tests.support.tiny_chat import write_tiny_chat

COMMAND = [sys.executable, "-m", "jaxchat.generate"]
ENDLESS = {"max_position_embeddings": 1 << 20}  # with --ignore_eos it generates until it is stopped
RATES = re.compile(
    r"prefill: \d+ tokens, [\d.]+ tokens/s; decode: \d+ tokens, [\d.]+ tokens/s; first token: [\d.]+ s"
)
COSTS = re.compile(r"load: [\d.]+ s; compile: [\d.]+ s \(not in the rates\); peak memory: [\d.]+ [MG]iB")


def run(*arguments, stdin="", code=0):
    """The finished process, whose exit code must be `code`; bytes in, text out."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run([*COMMAND, *map(str, arguments)], input=data, capture_output=True, timeout=120)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, done.stderr
    return done


def error_of(*arguments, code, **options):
    """The one line an unsuccessful run prints, without its prefix."""
    done = run(*arguments, code=code, **options)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("jaxchat: error: ")
    return lines[0].removeprefix("jaxchat: error: ")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("model") / "tiny-chat", **ENDLESS)


@pytest.fixture
def copied(chat_model, tmp_path):
    """A copy of the model to damage."""
    return shutil.copytree(chat_model, tmp_path / "copy")


# --- help and flags


def test_help_lists_every_flag_with_an_example_in_80_columns(capsys):
    assert generate.main(["jaxchat", "--help"]) == 0
    text = capsys.readouterr().out
    entries = re.split(r"\n  (?=-)", text.split("\nModel:")[1])[1:]
    flags = set(generate.define_flags().flag_values_dict()) - {"m", "p", "s", "i", "l", "t", "k", "q", "h"}
    assert {re.search(r"--(\w+)", entry)[1] for entry in entries} == flags
    assert all("e.g." in entry for entry in entries)
    assert max(map(len, text.splitlines())) <= 82  # the usage line


def test_help_and_show_do_not_import_jax(chat_model):
    code = (
        "import sys; from jaxchat import generate; "
        "generate.main(['', '-h']); generate.main(['', '--show', '-m', sys.argv[1]]); "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(chat_model)], check=True, stdout=subprocess.DEVNULL)


def test_without_a_model_it_is_the_one_in_the_box(chat_model, capsys, monkeypatch):
    monkeypatch.setattr(generate.demo, "path", lambda: chat_model)
    assert generate.main(["", "-p", "hello", "--max_new_tokens", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny-chat"


def test_dashes_in_flag_names_are_underscores_but_values_stay(capsys, chat_model):
    arguments = ["--layer-spec=0,2", "--max-length", "10", "--hide-banner", "--prompt", "--top-k"]
    assert generate.main(["", "-m", str(chat_model), "--show", *arguments]) == 0
    out = capsys.readouterr().out
    assert "layer plan  0,2\n" in out
    assert " at 10 tokens\n" in out


def test_sampling_defaults_are_those_of_the_library():
    values = generate.define_flags()
    values(["", "-m", "x", "-p", "y"])
    assert generate._request(values).options == generate.GenerateOptions()


def test_sampling_that_is_not_asked_for_is_what_the_model_recommends(tmp_path):
    def options(*arguments):
        values = generate.define_flags()
        values(["", "-m", str(tmp_path), "-p", "y", *arguments])
        return generate._request(values).options

    config = tmp_path / "generation_config.json"
    config.write_text('{"do_sample": true, "temperature": 0.5, "top_k": 40, "max_new_tokens": 7}')
    assert options() == generate.GenerateOptions(temperature=0.5, top_k=40)
    assert options("--top_k", "0", "-q", "0.9") == generate.GenerateOptions(temperature=0.5, top_p=0.9)
    assert options("-t", "0").temperature == 0
    config.write_text('{"temperature": 0.5, "top_k": 40}')
    assert options() == generate.GenerateOptions()
    config.write_text('{"do_sample": true, "temperature": "hot"}')
    with pytest.raises(JaxchatError, match="temperature is 'hot', not a number"):
        options()


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


def test_standard_output_is_the_text_and_standard_error_the_statistics(chat_model):
    done = run("-m", chat_model, "-p", "hello", "--max_new_tokens", "8")
    assert done.stdout.endswith("\n")
    assert "tokens/s" not in done.stdout
    rates, costs = done.stderr.splitlines()
    assert RATES.fullmatch(rates)
    assert COSTS.fullmatch(costs)


def test_json_is_one_object_and_repeats_with_its_seed(chat_model):
    arguments = ("-m", chat_model, "-p", "hello", "--max_new_tokens", "12", "-t", "1.5", "--json", "--seed")
    first, again, other = (json.loads(run(*arguments, seed).stdout) for seed in ("7", "7", "8"))
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


def test_a_prefix_opens_the_reply_and_its_reasoning_is_told_apart(chat_model, capfd):
    prefix = r"Hm,\u0020so</think>Well,\n"
    flags = [
        "-m",
        str(chat_model),
        "-p",
        "hello",
        "--max_new_tokens",
        "2",
        "--thought_tags",
        "<think> </think>",
    ]
    flags += ["--ai_prefix", "<think>" + prefix]
    assert generate.main(["", *flags, "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["reasoning"] == "Hm, so"
    assert answer["content"].startswith("Well,\n")
    assert answer["text"] == answer["reasoning"] + answer["content"]
    assert answer["ai_prefix"] == "<think>Hm, so</think>Well,\n"
    assert len(answer["token_ids"]) == 2  # those of the prefix were not drawn

    # Without a terminal the content alone is the output, and what the model thinks goes where statistics go.
    assert generate.main(["", *flags]) == 0
    out, err = capfd.readouterr()
    assert out == answer["content"] + "\n"
    assert err.startswith("Hm, so\n")


def test_a_session_goes_on_in_another_process_as_if_it_had_never_stopped(chat_model, tmp_path):
    chat = jaxchat.load(chat_model).chat_session("be nice")
    expected = ["".join(chat.send(text, max_new_tokens=6)) for text in ("one", "two")]

    file = tmp_path / "talk.session"
    flags = ("-m", chat_model, "--max_new_tokens", 6, "--save_session", file)
    first = run(*flags, "-p", "one", "-s", "be nice")
    second = run(*flags, "-p", "two", "--load_session", file)
    assert [first.stdout, second.stdout] == [text + "\n" for text in expected]

    flags = ("-m", chat_model, "-p", "x", "--load_session")
    assert "made under the layer plan all, this is 2::-1" in error_of(
        *flags, file, "--layer_spec=::-1", code=2
    )
    assert "no such session file" in error_of(*flags, tmp_path / "none", code=2)


def test_a_layer_plan_changes_the_output_and_the_parameter_count(chat_model):
    arguments = ("-m", chat_model, "-p", "hello", "--max_new_tokens", "12", "--json", "--layer-spec")
    plain, same, reversed_ = (json.loads(run(*arguments, spec).stdout) for spec in ("all", "0:3", "::-1"))
    assert plain["token_ids"] == same["token_ids"] != reversed_["token_ids"]
    assert plain["parameters"] == reversed_["parameters"]


def test_a_prompt_from_standard_input_equals_one_on_the_command_line(chat_model):
    arguments = ("-m", chat_model, "--max_new_tokens", "8", "--format", "completion")
    given = run(*arguments, "-p", "höla\n")
    assert run(*arguments, "--prompt_file", "-", stdin="höla\n\n").stdout == given.stdout


def test_a_model_without_a_template_continues_the_prompt_and_says_so(tmp_path):
    model = write_tiny_chat(tmp_path / "m", template=None, **ENDLESS)
    done = run("-m", model, "-p", "hello", "--max_new_tokens", "4", "--json")
    assert json.loads(done.stdout)["format"] == "completion"
    assert done.stderr.splitlines() == [
        "jaxchat: this model has no chat template: the prompt is continued as text (--format completion)"
    ]


def test_a_full_context_is_never_silent(chat_model):
    done = run("-m", chat_model, "-p", "hello", "--max_length", "90", "--ignore_eos")
    assert "jaxchat: the context of 90 tokens is full; raise --max_length" in done.stderr


def test_show_as_json(chat_model, capsys):
    assert generate.main(["", "-m", str(chat_model), "--show", "--json", "--layer_spec", "0,0"]) == 0
    assert json.loads(capsys.readouterr().out)["layer_spec"] == "0,0"


def test_craftgpt_holds_a_sensible_short_chat(shared_data):
    done = run("-m", shared_data / "models/CraftGPT-hf", "-p", "do you like music?")
    assert done.stdout.strip() == "yes, i enjoy listening to music while i feel happy and relaxed."


# --- wrong usage: exit code 2, one line, before JAX is imported


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do: give a prompt with -p or --prompt_file"),
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
        (("-m", "MODEL", "-p", "x", "--max_new_tokens", "0"), "--max_new_tokens=0: "),
        (("-m", "MODEL", "-p", "x", "-t", "warm"), "--temperature=warm: "),
        (("-m", "MODEL", "-p", "x", "--seed", "-1"), "--seed=-1: "),
        (("-m", "MODEL", "-p", "x", "--dtype", "int3"), "--dtype=int3: value should be one of <float32|"),
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
            "--ai_prefix_in=answer: value should be one of",
        ),
        (("-m", "MODEL", "-p", "x", "-s", "y", "--format", "completion"), "--system needs a chat"),
    ],
)
def test_wrong_usage(chat_model, capsys, arguments, message):
    words = [str(chat_model) if argument == "MODEL" else argument for argument in arguments]
    assert generate.main(["jaxchat", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"jaxchat: error: {message}")
    assert err.count("\n") == 1


def test_a_missing_model_directory(tmp_path):
    assert "no such model directory" in error_of("-m", tmp_path / "nowhere", "-p", "x", code=2)


def test_a_bad_plan_is_underlined(chat_model):
    done = run("-m", chat_model, "-p", "x", "--layer_spec", "0:2,9", code=2)
    line, spec, caret = done.stderr.splitlines()
    assert line == "jaxchat: error: layer 9 is out of range: the model has 3 layers, expected -3 to 2"
    assert (spec, caret) == ("0:2,9", "    ^")


def test_a_prompt_file_that_is_not_utf8(chat_model, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"good\xe9bad")
    message = error_of("-m", chat_model, "--prompt_file", path, code=2)
    assert f"{path}: not UTF-8 text: byte 0xe9 at offset 4" in message


def test_an_unknown_family(copied):
    (copied / "config.json").write_text('{"model_type": "rwkv"}')
    message = error_of("-m", copied, "-p", "x", code=2)
    assert "model_type 'rwkv' is not supported; supported: " in message
    assert "llama" in message


def test_a_corrupt_configuration(copied):
    (copied / "config.json").write_text('{"model_type": ')
    assert "config.json: not readable as JSON" in error_of("-m", copied, "-p", "x", code=1)


# --- wrong input that shows later


def test_a_bad_sampling_value(chat_model):
    assert "top_p: got 1.5, expected" in error_of("-m", chat_model, "-p", "x", "-q", "1.5", code=2)


def test_a_prompt_longer_than_the_context(chat_model):
    message = error_of("-m", chat_model, "-p", "much too long", "--max_length", "8", code=2)
    assert "17 tokens, too many for the context of 8" in message


def test_truncated_weights(copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in error_of("-m", copied, "-p", "x", code=1)


def test_weights_of_another_shape(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    message = error_of("-m", copied, "-p", "x", code=1)
    assert "mlp.gate_proj.weight: expected [48, 24], found [44, 24]" in message
    assert "mlp.down_proj.weight: expected [24, 48], found [24, 44]" in message


def test_a_model_without_a_tokenizer(copied):
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer_config.json").unlink()
    assert "no tokenizer" in run("-m", copied, "-p", "x", code=2).stderr


def test_an_internal_error_is_one_line_and_debug_shows_where(chat_model, capsys, monkeypatch):
    monkeypatch.setattr(generate.show, "describe_directory", lambda *_, **__: 1 / 0)
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


def test_a_reader_that_leaves_ends_the_program_quietly(chat_model):
    process = subprocess.Popen(
        [*COMMAND, "-m", chat_model, "-p", "hello", "--ignore_eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == command_line.BROKEN_PIPE == 141


def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "-h"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"jaxchat: error: input or output: No space left on device\n"


def test_interactive_from_a_pipe_prints_replies_only_and_survives_errors(chat_model):
    messages = ["hello", "", "/plan ::-1", "/nonsense", "x" * 100, "/plan 7", "//hello", "/stats", "/restart"]
    done = run(
        *("-m", chat_model, "-i", "--max_new_tokens", "4", "--max_length", "90"),
        stdin="\n".join([*messages, "hello"]) + "\n",
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("jaxchat: error: ")]
    expected = ("no command /nonsense", "too many for the context of 90", "layer 7 is out of range")
    assert len(errors) == 3
    assert all(part in error for part, error in zip(expected, errors, strict=True))
    assert "layer plan 2::-1: 3 slots, " in done.stderr
    assert "You" not in done.stdout
    assert len(RATES.findall(done.stderr)) == 2  # /stats, and at the end


# --- Ctrl-C without a terminal; with one: test_terminal.py


def test_an_interrupt_without_a_terminal_ends_with_130_and_one_line_break(chat_model):
    process = subprocess.Popen(
        [*COMMAND, "-m", chat_model, "-p", "hello", "--ignore_eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(1)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert out.endswith(b"\n")
