"""What stands in a tokenizer's files: odd but meant, it is understood; broken, it is one line."""

import functools
import io
import json
import os
import subprocess
import sys

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxchat.errors import JaxchatError
from jaxchat.text.tokenizer import Detokenizer
from jaxchat.text.tokenizer_files import load_tokenizer, text_files

CORPUS = ["she sells sea shells by the sea shore; yes, she does!", "sell; sell; the shells"] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]


@functools.cache
def bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, **options))
    return tokenizer.to_str()


@functools.cache
def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    options = {"special_tokens": SPECIAL, "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=60, **options))
    return tokenizer.to_str()


@functools.cache
def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    options = {"special_tokens": SPECIAL, "show_progress": False}
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=80, **options))
    return tokenizer.to_str()


@functools.cache
def pieces(**options):
    """A SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=60,
        minloglevel=2,
        **{"model_type": "bpe", **options},
    )
    return model.getvalue()


KINDS = {"bpe": bpe, "unigram": unigram, "wordpiece": wordpiece, "sentencepiece": pieces}


def load(folder, kind, config=None, edit=None, **files):
    """The tokenizer of a kind, written to `folder` with what stands beside it."""
    folder.mkdir(exist_ok=True)
    content = KINDS[kind]()
    if kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(content)
    else:
        spec = json.loads(content)
        spec = (edit and edit(spec)) or spec
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    for name, value in ({"tokenizer_config": config or {}} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return load_tokenizer(folder)


def spoken(tokenizer, text):
    """A text through ids and back, special tokens left out, as a whole and token by token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = Detokenizer(tokenizer)
    streamed = "".join(map(stream.push, ids)) + stream.flush()
    assert tokenizer.decode(ids, skip_special_tokens=True) == streamed
    return streamed


# --- special tokens that are text


BORROWED = {
    "bpe": ["!", "s", "the", "ell", "Ġshe"],
    "unigram": ["!", ";", "s", "▁the"],
    "wordpiece": ["!", "s", "the", "##s"],
    "sentencepiece": ["!", ";", "s", "▁the"],
}


@pytest.mark.parametrize(("kind", "token"), [(kind, token) for kind in BORROWED for token in BORROWED[kind]])
@pytest.mark.parametrize(
    "key", ["pad_token", "eos_token", "bos_token", "unk_token", "additional_special_tokens"]
)
def test_a_special_token_that_is_a_piece_of_text_stays_text(kind, token, key, tmp_path):
    plain = load(tmp_path / "plain", kind)
    config = {key: [token] if key.startswith("additional") else token}
    borrowed = load(tmp_path / "borrowed", kind, config)
    for text in ("the shells!", "yes; she sells!!", "</s> the </s>s!"):
        ids = plain.encode(text, add_special_tokens=False)
        assert borrowed.encode(text, add_special_tokens=False) == ids
        assert borrowed.encode_after(text, after=ids[0]) == plain.encode_after(text, after=ids[0])
        assert spoken(borrowed, text) == spoken(plain, text)
    if key in ("bos_token", "eos_token"):
        [named] = borrowed.eos_ids if key == "eos_token" else [borrowed.bos_id]
        assert borrowed.token_bytes(named).decode().strip(" ") == token.strip("▁Ġ#") or kind == "wordpiece"


@pytest.mark.parametrize(
    ("kind", "token"), [("bpe", "!"), ("bpe", "ell"), ("unigram", "!"), ("wordpiece", "the")]
)
def test_so_it_does_where_the_tokenizer_s_own_file_lists_it(kind, token, tmp_path):
    plain = load(tmp_path / "plain", kind)

    def list_it(spec):
        tokenizer = Tokenizer.from_str(json.dumps(spec))
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        return json.loads(tokenizer.to_str())

    borrowed = load(tmp_path / "borrowed", kind, {"pad_token": token}, list_it)
    for text in ("the shells!", "<s>yes; the sells!!"):
        assert borrowed.encode(text) == plain.encode(text)
        assert spoken(borrowed, text) == spoken(plain, text)
    assert token not in borrowed.special_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_made_for_it_is_none(kind, tmp_path):
    tokenizer = load(tmp_path, kind, {"eos_token": "</s>", "pad_token": "<pad>"})
    assert {"</s>", "<pad>"} <= tokenizer.special_tokens.keys()
    ids = tokenizer.encode("the</s>", parse_special=True, add_special_tokens=False)
    assert ids[-1] == tokenizer.special_tokens["</s>"]
    assert tokenizer.special_tokens["</s>"] not in tokenizer.encode("the</s>", add_special_tokens=False)


def test_added_tokens_of_a_sentencepiece_model_are_found_in_any_text(tmp_path):
    added = {"[QUERY]": 60, "<call>": 61, "<|end|>": 62}
    tokenizer = load(tmp_path, "sentencepiece", added_tokens=added)
    for text in ("sell [QUERY] the", "<call>sea<call>", "[QUERY]", "she</s> [QUERY]<|end|>"):
        plain = tokenizer.encode(text, add_special_tokens=False)
        parsed = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        for name, token_id in added.items():
            assert parsed.count(token_id) == text.count(name)
            assert plain.count(token_id) == (0 if name == "<|end|>" else text.count(name))


# --- add_prefix_space


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("key", [True, False, None])
@pytest.mark.parametrize("layout", ["sentencepiece", "byte level", "sequence", "metaspace", "prepend"])
def test_add_prefix_space_wins_over_the_tokenizer_s_own_file(layout, key, own, tmp_path):
    config = {} if key is None else {"add_prefix_space": key}
    if layout == "sentencepiece":
        (tmp_path / "tokenizer.model").write_bytes(pieces(add_dummy_prefix=own))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(tmp_path)
    else:
        tokenizer = load(tmp_path, "bpe", config, functools.partial(_with_layout, layout, own))
    prefixed = own if key is None else key
    ids, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("sea", " sea"))
    # Of SentencePiece's `▁` the decoder takes the first off again, byte-level tokenizers leave it.
    space = b" " if prefixed else b""
    assert b"".join(map(tokenizer.token_bytes, ids)) == space + b"sea"
    shown = tokenizer.decode(ids)
    assert shown == (" sea" if prefixed and layout in ("byte level", "sequence") else "sea")
    assert tokenizer.decode(spaced).lstrip() == "sea"


def _with_layout(layout, own, spec):
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    vocab = tokenizer.get_vocab() | {"▁": 400}
    if layout in ("metaspace", "prepend"):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    space = decoders.Replace("▁", " ")
    if layout == "metaspace":
        scheme = "always" if own else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    elif layout == "prepend":
        steps = [normalizers.Prepend("▁")] if own else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if own else []
        tokenizer.decoder = decoders.Sequence([space, decoders.Fuse(), *strip])
    else:
        step = pre_tokenizers.ByteLevel(add_prefix_space=own)
        alone = layout == "byte level"
        tokenizer.pre_tokenizer = step if alone else pre_tokenizers.Sequence([pre_tokenizers.Digits(), step])
    return json.loads(tokenizer.to_str())


# --- names of files


@pytest.mark.parametrize("name", ["tokenizer.model.v7", "spiece.model", "sentencepiece.bpe.model"])
def test_the_files_of_a_tokenizer_are_those_that_are_read(name, tmp_path):
    (tmp_path / name).write_bytes(pieces())
    (tmp_path / "chat_template.jinja").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("")
    assert load_tokenizer(tmp_path).vocab_size == 60
    found = {str(path.relative_to(tmp_path)) for path in text_files(tmp_path)}
    assert found == {name, "chat_template.jinja", "additional_chat_templates/tool_use.jinja"}


# --- broken files


def put(path, value):
    """An edit that sets what is at `path`."""

    def edit(spec):
        at = spec
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return edit


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<nobody>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("kind", "path", "value", "says"),
    [
        ("bpe", ["model"], None, "key 'model' is None; expected a tokenizer's model"),
        ("bpe", ["model", "continuing_subword_prefix"], "@@", r"model\.merges\[0\]' is .*second begins '@@'"),
        ("bpe", ["model", "continuing_subword_prefix"], "é", r"model\.merges\[0\]"),
        ("bpe", ["model", "vocab", "!"], 2**31, "is 2147483648; expected a token id"),
        ("bpe", ["model", "vocab", "!"], -1, "is -1; expected a token id"),
        ("bpe", ["model", "vocab", "!"], 5, "gives .* one id, 5"),
        ("bpe", ["model", "vocab", "!"], "5", r"model\.vocab\.!' is '5'; expected a token id"),
        (
            "bpe",
            ["added_tokens", 0, "id"],
            2**31,
            r"added_tokens\[0\]\.id' is 2147483648; expected a token id",
        ),
        ("bpe", ["added_tokens"], 5, "key 'added_tokens' is 5; expected a list of tokens"),
        ("bpe", ["post_processor"], TEMPLATE, "no entry found"),
        ("unigram", ["model", "vocab"], [], ""),
        ("wordpiece", ["model", "vocab"], {}, ""),
        ("unigram", ["normalizer"], {"type": "Precompiled", "precompiled_charsmap": ""}, "charsmap"),
        ("unigram", ["normalizer"], {"type": "Precompiled", "precompiled_charsmap": "////fwAA"}, "charsmap"),
        ("bpe", ["decoder"], {"type": "Nothing"}, ""),
    ],
)
def test_a_broken_tokenizer_is_one_line_that_names_it(kind, path, value, says, tmp_path, capfd):
    with pytest.raises(JaxchatError, match=rf"tokenizer\.json: .*{says}.*download the file again") as excinfo:
        load(tmp_path, kind, edit=put(path, value)).encode("the shells!")
    assert "\n" not in str(excinfo.value)
    assert capfd.readouterr().err == ""


def test_a_panic_while_encoding_is_an_error_too(tmp_path):
    def edit(spec):
        steps = [{"type": "ByteLevel", "add_prefix_space": False}, {"type": "FixedLength", "length": 0}]
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}

    with pytest.raises(JaxchatError, match=r"tokenizer\.json: not a readable tokenizer \(.*\): download"):
        load(tmp_path, "bpe", edit=edit).encode("the shells!")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("tokenizer_config", {"pad_token": 5}, "key 'pad_token' is 5; expected the text of a token"),
        ("tokenizer_config", {"eos_token": {"content": None}}, "key 'eos_token' is .*expected the text"),
        (
            "tokenizer_config",
            {"additional_special_tokens": -1},
            "'additional_special_tokens' is -1; expected a list",
        ),
        (
            "tokenizer_config",
            {"add_prefix_space": "no"},
            "'add_prefix_space' is 'no'; expected true or false",
        ),
        (
            "tokenizer_config",
            {"added_tokens_decoder": ["a"]},
            "'added_tokens_decoder' is .*; expected tokens",
        ),
        ("tokenizer_config", {"added_tokens_decoder": 3}, "'added_tokens_decoder' is 3; expected tokens"),
        ("tokenizer_config", {"added_tokens_decoder": {"²": "<x>"}}, "expected a token, and a number"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"9": None}},
            "added_tokens_decoder.9' is None; expected",
        ),
        ("tokenizer_config", {"added_tokens_decoder": {"9" * 30: "<x>"}}, "expected a token id"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"9": {"content": "a", "lstrip": 3}}},
            "9.lstrip' is 3",
        ),
        ("special_tokens_map", {"bos_token": ["<s>"]}, "key 'bos_token' is .*; expected the text of a token"),
        ("added_tokens", {"<a>": "x"}, "key '<a>' is 'x'; expected a token id"),
        ("added_tokens", {"<a>": None}, "key '<a>' is None; expected a token id"),
        ("added_tokens", {"<a>": 2**31}, "key '<a>' is 2147483648; expected a token id"),
    ],
)
@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_value_of_the_wrong_type_names_file_and_key(kind, name, value, says, tmp_path):
    with pytest.raises(JaxchatError, match=rf"{name}\.json: .*{says}") as excinfo:
        load(tmp_path, kind, **({"config": value} if name == "tokenizer_config" else {name: value}))
    assert "\n" not in str(excinfo.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:77\nsize 493443\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize(("content", "says"), [(POINTER, "run `git lfs pull` in"), (PAGE, "a web page")])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json", "vocab.json",
             "merges.txt"]
)  # fmt: skip
def test_what_was_not_downloaded_is_told(name, content, says, tmp_path):
    if name in ("vocab.json", "merges.txt"):
        (tmp_path / "vocab.json").write_text("{}")
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    elif not name.startswith("tokenizer."):
        load(tmp_path, "bpe")
    (tmp_path / name).write_text(content)
    with pytest.raises(JaxchatError, match=rf"{name}: .*{says}"):
        load_tokenizer(tmp_path)


def test_no_edit_of_a_tokenizer_ends_the_process(tmp_path):
    """The library aborts where an error meets another: the edits are tried in a process of their own."""
    base = json.loads(bpe())
    prefixes = ["s", "é", "▁▁", "##", "\U0001f600", "a" * 40]
    specs = [{**base, "model": {**base["model"], "continuing_subword_prefix": p}} for p in prefixes]
    script = (
        "import json, sys, pathlib\n"
        "from jaxchat.text.tokenizer_files import load_tokenizer\n"
        "from jaxchat.errors import JaxchatError\n"
        "for spec in json.load(sys.stdin):\n"
        "    (pathlib.Path(sys.argv[1]) / 'tokenizer.json').write_text(json.dumps(spec))\n"
        "    try: load_tokenizer(sys.argv[1]).encode('the shells')\n"
        "    except JaxchatError: print('told')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        input=json.dumps(specs),
        capture_output=True,
        text=True,
        env={**os.environ, "RUST_BACKTRACE": "0"},
    )
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, ["told"] * len(specs), "")
