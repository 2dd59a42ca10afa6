"""What text becomes which ids with a GGUF's metadata: llama.cpp's, in every class, and hostile files."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxchat.errors import JaxchatError
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.pre_tokenizers import PRE_TOKENIZERS
from jaxchat.text.tokenizer_config import read_config
from jaxchat.text.tokenizer_files import load_tokenizer, text_files
from jaxchat.text.tokenizer_gguf import chat_template_of, hugging_face_files, tokenizer_of
from jaxchat.text.tokenizer_json import byte_level_table
from tests.support.gguf_vocabularies import (
    BYTE,
    CONTROL,
    DATA,
    KEY,
    NAMES,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    bpe,
    metadata,
)

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real vocabularies are not at {DATA}")

# Metadata, and llama.cpp's vectors of it: pairs of files .inp and .out.
VECTORS = {
    **{
        name: name
        for name in (
            "bert-bge",
            "deepseek-coder",
            "falcon",
            "gpt-2",
            "llama-spm",
            "phi-3",
            "qwen2",
            "llama-bpe",
        )
    },
    "deepseek-r1-qwen": "qwen2",
}


def _vectors(name: str) -> list[tuple[str, list[int]]]:
    start = DATA / "vocab-gguf" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{start}.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{start}.out").read_text().split("\n")
    return [
        (text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=False)
    ]


@needs_data
@pytest.mark.parametrize("name", VECTORS)
def test_texts_become_llama_cpps_ids_and_those_the_texts(name: str) -> None:
    tokenizer = tokenizer_of(metadata(VECTORS[name]), name)
    assert tokenizer is not None
    vectors = _vectors(name)
    assert len(vectors) > 40
    for text, ids in vectors:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        if name != "bert-bge":  # lower case, and no spaces of its own
            assert tokenizer.decode(ids) == text


# Metadata -> the key of what transformers made of texts.
TRANSFORMERS = {
    "bert-bge": "bert-base-uncased",
    "gpt-2": "distilgpt2",
    "llama-spm": "coreml-projects/Llama-2-7b-chat-coreml",
    "falcon": "tiiuae/falcon-7b",
    "t5": "t5-base",
    "llama-bpe": "pcuenq/Llama-3.2-1B-Instruct-tokenizer",
}


@needs_data
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_texts_become_transformers_ids(name: str) -> None:
    tokenizer = tokenizer_of(metadata(name), name)
    assert tokenizer is not None
    cases = json.loads((DATA / "oracles" / "tokenizers-swift" / "tokenizer_tests.json").read_text())
    for case in cases[TRANSFORMERS[name]]:
        assert tokenizer.encode(case["input"], parse_special=True) == case["encoded"]["input_ids"]


_SLOW = ("baichuan", "gpt-neox", "falcon", "deepseek-coder", "phi-3", "llama-bpe")


@needs_data
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.full] if n in _SLOW else []) for n in NAMES],
)
def test_the_files_written_of_it_are_the_same_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(metadata(name), name)
    for file, data in hugging_face_files(metadata(name), name).items():
        (tmp_path / file).write_bytes(data)
    again = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert again.special_tokens == tokenizer.special_tokens
    assert (again.bos_id, again.eos_ids) == (tokenizer.bos_id, tokenizer.eos_ids[:1])
    for text in ("Hello, World! 1234\n\n  x", "<s>é日本</s>", "", " ", *list(tokenizer.added_tokens)[:9]):
        for special in (False, True):
            assert again.encode(text, parse_special=special) == tokenizer.encode(text, parse_special=special)


# --- how text is cut

SAMPLE = "DON'T you're 1234567 ÄPFELmann\r\n\n  $5!? 日本a¼ x_y"
# The first name of a class, and the pieces: with llama.cpp's in a live comparison of 498 texts, but for
# `tiny_aya`, `superbpe` and `afmoe`, whose patterns llama.cpp approximates.
PIECES = (
    ("default", "DON│'│T│ you│'│re│ │123│456│7│ ÄPFELmann│\r\n\n  │$│5│!?│ 日本a│¼│ x│_│y"),
    ("llama3", "DON│'T│ you│'re│ │123│456│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("dbrx", "DON│'T│ you│'re│ │123│456│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("glm4", "DON│'T│ you│'re│ │123│456│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("tekken", "DON│'T│ you│'re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("gpt-2", "DON│'│T│ you│'re│ 1234567│ ÄPFELmann│\r\n\n │ $│5│!?│ 日本a│¼│ x│_│y"),
    ("starcoder", "DON│'│T│ you│'re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r\n\n │ $│5│!?│ 日本a│¼│ x│_│y"),
    ("qwen2", "DON│'T│ you│'re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("qwen35", "DON│'T│ you│'re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("ufakzeka", "DON│'T│ you│'re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("laguna", "DON│'T│ you│'re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r│\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("gpt-4o", "DON'T│ you're│ │123│456│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("granite-embed-multi-97m", "DON'T│ you're│ │123│456│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("kimi-k2", "DON'T│ you're│ │123│456│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ │日本│a│¼│ x│_y"),
    ("tiny_aya", "DON'T│ you're│ │1│234│567│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("deepseek-llm", "DON│'│T│ you│'│re│ │1234567│ Ä│PFELmann│\r│\n│\n│ │ $│5│!?│ │日本│a│¼│ x│_│y"),
    ("deepseek-coder", "DON│'│T│ you│'│re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r│\n│\n│  $│5│!?│ │日本│a│¼│ x│_│y"),
    ("deepseek-v3", "DON│'T│ you│'re│ │123│456│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ │日本│a│¼│ x│_y"),
    ("spark2_5", "DON│'T│ you│'re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r│\n│\n│ │ $│5│!?│ │日本│a│¼│ x│_y"),
    ("youtu", "DON'T│ you're│ │1│2│3│4│5│6│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ │日本│a│¼│ x│_y"),
    ("falcon", "DON│'│T│ you│'│re│ │123│456│7│ ÄPFELmann│\r\n\n  │$│5│!?│ 日本a│¼│ x│_│y"),
    ("bloom", "DON'T│ you're│ 1234567│ ÄPFELmann│\r\n\n │ $5│!?│ 日本a¼│ x_y"),
    ("viking", "DON'T│ you're│ │1│2│3│4│5│6│7│ ÄPFELmann│\r\n\n │ $│5│!?│ 日本a│¼│ x_y"),
    ("chameleon", "DON│'│T│ you│'│re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r│\n│\n│  │$│5│!│?│ 日本a│¼│ x│_│y"),
    ("superbpe", "DON'T you're │1│234│567│ ÄPFELmann\r\n\n  $│5│!? 日本a│¼│ x_y"),
    ("bailingmoe", "DON│'T│ you│'re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("seed-coder", "DON│'T│ you│'re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("afmoe", "DON│'T│ you│'re│ │1│234│567│ ÄPFELmann│\r\n\n│ │ $│5│!?│ │日本│a│¼│ x│_y"),
    ("exaone-moe", "DON│'T│ you│'re│ │1│2│3│4│5│6│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("jais-2", "DON│'T│ you│'re│ │123│456│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("minicpm5", "DON│'T│ you│'re│ │123│456│7│ ÄPFELmann│\r\n\n│ │ $│5│!?│ 日本a│¼│ x│_y"),
    ("gemma4", "DON'T you're 1234567 ÄPFELmann\r│\n\n│  $5!? 日本a¼ x_y"),
    ("sarvam-moe", "DON'T you're 1234567 ÄPFELmann\r│\n\n│  $5!? 日本a¼ x_y"),
)


def _plain(pre: str | None, **more: Any) -> dict[str, Any]:
    """A vocabulary of the 256 bytes, and two words."""
    tokens = [*byte_level_table(), "ab", "abc", "<|end|>", "Ġ<x>"]
    return bpe(tokens, ["a b"], pre, types=[NORMAL] * 258 + [CONTROL, USER_DEFINED], **more)


@pytest.mark.parametrize(("pre", "pieces"), PIECES)
def test_text_is_cut_as_the_pre_tokenizer_says(pre: str, pieces: str) -> None:
    import tokenizers

    spec = hugging_face_files(_plain(pre), "f.gguf")["tokenizer.json"].decode()
    cut = tokenizers.Tokenizer.from_str(spec).pre_tokenizer.pre_tokenize_str(SAMPLE)
    table = byte_level_table() if PRE_TOKENIZERS[pre].byte_level else None
    found = [bytes(table[c] for c in piece).decode() if table else piece for piece, _ in cut]
    assert "│".join(found) == pieces


def test_every_class_of_pre_tokenizers_has_a_case() -> None:
    classes = {id(pre): name for name, pre in reversed(PRE_TOKENIZERS.items())}
    assert {pre for pre, _ in PIECES} == set(classes.values())


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2"])
def test_a_piece_that_is_a_token_is_that_token_where_merges_are_ignored(pre: str) -> None:
    tokenizer = tokenizer_of(_plain(pre), "f.gguf")
    assert tokenizer is not None
    whole = [257] if pre == "llama-bpe" else [256, tokenizer.encode("c")[0]]
    assert tokenizer.encode("abc") == whole


@pytest.mark.parametrize(
    ("pre", "said"), [("no\x1bsuch", "is 'no\\x1bsuch', which is not known"), (None, "is missing")]
)
def test_an_unknown_pre_tokenizer_is_told_in_a_line_and_the_default_serves(
    pre: str | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = tokenizer_of(_plain(pre), "f.gguf")
    assert tokenizer is not None
    assert [said in record.message for record in caplog.records] == [True]
    assert tokenizer.encode(SAMPLE) == tokenizer_of(_plain("default"), "f.gguf").encode(SAMPLE)  # type: ignore[union-attr]


# --- special tokens


@needs_data
@pytest.mark.parametrize("name", ["llama-spm", "gpt-2", "qwen2", "phi-3", "t5", "bert-bge"])
def test_special_tokens_in_text_are_text_unless_asked(name: str) -> None:
    tokenizer = tokenizer_of(metadata(name), name)
    assert tokenizer is not None
    content, token = list(tokenizer.special_tokens.items())[-1]
    plain = tokenizer.encode(f"a{content}b", add_special_tokens=False)
    assert token not in plain
    assert token in tokenizer.encode(f"a{content}b", add_special_tokens=False, parse_special=True)


@needs_data
def test_every_token_that_ends_a_text_is_an_end_and_text_that_looks_like_one_is_none() -> None:
    tokenizer = tokenizer_of(metadata("qwen2"), "f.gguf")
    assert tokenizer is not None
    assert [tokenizer.token_bytes(i) for i in tokenizer.eos_ids] == [b"<|im_end|>", b"<|endoftext|>"]
    assert "</s>" not in tokenizer.added_tokens  # 128247, which merges make
    files = hugging_face_files(metadata("qwen2"), "f.gguf")
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": list(tokenizer.eos_ids)}


def _tagged(*tags: str, **ids: int) -> dict[str, Any]:
    return bpe([*byte_level_table(), *tags], [], "gpt-2", types=[NORMAL] * 256 + [CONTROL] * len(tags), **ids)


@pytest.mark.parametrize(
    ("metadata_", "ends"),
    [
        (_tagged("<|end|>", "<|return|>", "<|call|>", eos_token_id=257), ["<|return|>", "<|call|>"]),
        (_tagged("<|end|>", "<a>", eos_token_id=257), ["<a>", "<|end|>"]),
        (_tagged("<a>", "<b>", eos_token_id=256, eot_token_id=257), ["<a>", "<b>"]),
        (_tagged("</s>", "<|tool_response>"), ["<|tool_response>"]),
        (_tagged("<a>", eos_token_id=2**32 - 1), []),
        (_tagged("<a>", eos_token_id=-1, bos_token_id=257), []),
    ],
)
def test_the_ends_are_those_of_llama_cpp(metadata_: dict[str, Any], ends: list[str]) -> None:
    tokenizer = tokenizer_of(metadata_, "f.gguf")
    assert tokenizer is not None
    assert [tokenizer.token_bytes(i).decode() for i in tokenizer.eos_ids] == ends
    assert tokenizer.bos_id is None


@pytest.mark.parametrize(
    ("flags", "ids"),
    [
        ({}, [0]),
        ({"add_bos_token": True, "bos_token_id": 256}, [256, 0]),
        (
            {
                "add_bos_token": np.True_,
                "bos_token_id": np.uint32(256),
                "add_eos_token": True,
                "eos_token_id": 257,
            },
            [256, 0, 257],
        ),
        ({"add_bos_token": True, "bos_token_id": -1}, [0]),
    ],
)
def test_a_text_gets_the_special_tokens_that_the_file_says(flags: dict[str, Any], ids: list[int]) -> None:
    tokenizer = tokenizer_of(_tagged("<a>", "<b>", **flags), "f.gguf")
    assert tokenizer is not None
    first = next(iter(byte_level_table().values()))
    assert tokenizer.encode(chr(first)) == ids


def test_phi_3s_special_tokens_swallow_the_spaces_behind_them() -> None:
    tokenizer = tokenizer_of(_tagged("<|user|>", "<s>") | {"general.name": "Phi-3 mini"}, "f.gguf")
    assert tokenizer is not None
    assert tokenizer.encode("<|user|> \n", parse_special=True) == [256]
    assert len(tokenizer.encode("<s> \n", parse_special=True)) == 3


# --- kinds without real files here


def _pieces(kind: str, pieces: dict[str, float], **more: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        f"{KEY}model": kind,
        f"{KEY}tokens": tokens,
        f"{KEY}scores": [0.0] * 259 + list(pieces.values()),
        f"{KEY}token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        **{KEY + key: value for key, value in more.items()},
    }


def test_sentencepiece_merges_the_best_score_first_and_the_rest_is_bytes() -> None:
    pieces = {"▁": -9.0, "a": -9.0, "b": -9.0, "ab": -1.0, "▁a": -2.0, "bb": -3.0, "▁ab": -4.0}
    tokenizer = tokenizer_of(_pieces("llama", pieces), "f.gguf")
    assert tokenizer is not None
    ids = tokenizer.encode("abb\n", add_special_tokens=False)
    assert [tokenizer.token_bytes(i) for i in ids] == [b" ab", b"b", b"\n"]
    assert tokenizer.encode("a") == [1, 259 + 4]
    plain = tokenizer_of(_pieces("llama", pieces, add_space_prefix=False), "f.gguf")
    assert plain is not None
    assert plain.encode("a") == [1, 260]
    assert plain.decode([263]) == " a"


@needs_data
def test_gemma_4s_text_is_merged_line_by_line_with_bos_whatever_the_file_says() -> None:
    tokenizer = tokenizer_of(metadata("spm-gemma4"), "f.gguf")
    assert tokenizer is not None
    ids = tokenizer.encode("hello hello\n\né")
    assert ids[0] == 2
    assert [tokenizer.token_bytes(i) for i in ids[1:]] == [
        b"hello",
        b" ",
        b"hello",
        b"\n",
        b"\n",
        b"\xc3",
        b"\xa9",
    ]


def _rwkv(**more: Any) -> dict[str, Any]:
    words = [b"the", b" the", b" t", b"\n\n", "é".encode(), b"\xe6\x97", b"'"]
    tokens = [
        "<s>",
        *(repr(bytes([byte]))[2:-1] for byte in range(255)),
        *(repr(word)[2:-1] for word in words),
    ]
    return {
        f"{KEY}model": "rwkv",
        f"{KEY}tokens": tokens,
        f"{KEY}token_type": [CONTROL] + [NORMAL] * (len(tokens) - 1),
        f"{KEY}eot_token_id": 259,
        **more,
    }


def test_rwkv_takes_the_longest_token_at_every_byte(tmp_path: Path) -> None:
    values = _rwkv()
    del values[f"{KEY}tokens"][-1], values[f"{KEY}token_type"][-1]  # "'" twice
    tokenizer = tokenizer_of(values, "f.gguf")
    assert tokenizer is not None
    text = " them\n\n\né日<s>"
    ids = tokenizer.encode(text)
    assert ids == [257, ord("m") + 1, 259, ord("\n") + 1, 260, 261, 0xA5 + 1, *(ord(c) + 1 for c in "<s>")]
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a<s>", parse_special=True) == [ord("a") + 1, 0]
    assert tokenizer.eos_ids == (259,)
    for file, data in hugging_face_files(values, "f.gguf").items():
        (tmp_path / file).write_bytes(data)
    assert load_tokenizer(tmp_path).encode(text) == ids
    assert [path.name for path in text_files(tmp_path)] == [
        "tokenizer_config.json",
        "rwkv_vocab_v20230424.txt",
    ]


@pytest.mark.parametrize(
    "line", ["x 'a' 1", "1 'a' 2", "1 __import__('os') 1", "1", "99999999999 'a' 1", "1 'a"]
)
def test_a_line_of_rwkvs_vocabulary_that_is_none_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text(f"1 'a' 1\n{line}\n")
    with pytest.raises(JaxchatError, match=r"rwkv_vocab_v20230424\.txt: line 2 is"):
        load_tokenizer(tmp_path)


# --- chat templates, and the original tokenizer


def test_chat_templates_are_found_by_name(tmp_path: Path) -> None:
    values = _tagged("<a>", "<b>", bos_token_id=256) | {
        "tokenizer.chat_templates": ["rag"],
        "tokenizer.chat_template": "{{ bos_token }}D",
        "tokenizer.chat_template.tool_use": "T",
    }
    tokenizer = tokenizer_of(values, "f.gguf")
    assert tokenizer is not None
    template = chat_template_of(values, "f.gguf", tokenizer)
    for file, data in hugging_face_files(values, "f.gguf").items():
        (tmp_path / file).write_bytes(data)
    for found in (template, ChatTemplate.load(tmp_path, load_tokenizer(tmp_path), read_config(tmp_path))):
        assert found is not None
        assert found.render([{"role": "user", "content": "x"}]) == "<a>D"
        assert found.render([], tools=[{}]) == "T"
    assert chat_template_of(_tagged("<a>"), "f.gguf", tokenizer) is None


def test_a_template_that_is_only_named_is_the_one_of_that_name() -> None:
    values = _tagged("<a>") | {"tokenizer.chat_template": "rwkv-world"}
    tokenizer = tokenizer_of(values, "f.gguf")
    assert tokenizer is not None
    template = chat_template_of(values, "f.gguf", tokenizer)
    assert template is not None
    assert template.render([{"role": "user", "content": "x"}], add_generation_prompt=True) == (
        "User: x\n\nAssistant:"
    )


@pytest.mark.parametrize("text", [5, "\udcff", "x" * (2**20 + 1), ["{{ a }}"]])
def test_a_broken_chat_template_is_told_where_it_is_needed(text: Any) -> None:
    values = _tagged("<a>") | {"tokenizer.chat_template": text}
    tokenizer = tokenizer_of(values, "f.gguf")
    assert tokenizer is not None
    template = chat_template_of(values, "f.gguf", tokenizer)
    assert template is not None
    with pytest.raises(JaxchatError, match=r"f\.gguf: key 'tokenizer\.chat_template' is .*expected a chat"):
        template.check()
    with pytest.raises(JaxchatError, match=r"f\.gguf: key 'tokenizer\.chat_template' is"):
        hugging_face_files(values, "f.gguf")


def test_the_original_tokenizer_serves_where_it_is_of_the_same_tokens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = _plain("gpt-2")
    spec = json.loads(hugging_face_files(values, "f.gguf")["tokenizer.json"])
    spec["normalizer"] = {"type": "Lowercase"}
    same = tokenizer_of(values | {"tokenizer.huggingface.json": json.dumps(spec)}, "f.gguf")
    assert same is not None
    assert same.decode(same.encode("ABC")) == "abc"
    assert not caplog.records
    spec["model"]["vocab"]["zz"] = spec["model"]["vocab"].pop("abc")
    for other in (json.dumps(spec), "{}", "x" * 99):
        caplog.clear()
        kept = tokenizer_of(values | {"tokenizer.huggingface.json": other}, "f.gguf")
        assert kept is not None
        assert kept.decode(kept.encode("ABC")) == "ABC"
        assert ["is left aside" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("model", [None, "none", "no_vocab"])
def test_a_file_without_a_tokenizer_has_none(model: str | None) -> None:
    values = {} if model is None else {f"{KEY}model": model}
    assert tokenizer_of(values, "f.gguf") is None
    assert hugging_face_files(values, "f.gguf") == {}


# --- hostile metadata

_GOOD = _plain("gpt-2")
_SPM = _pieces("llama", {"▁": -1.0, "a": -2.0})
HOSTILE = [
    (
        _GOOD | {f"{KEY}model": "plamo2"},
        "model' is 'plamo2'; expected one of llama, gpt2",
    ),
    (_GOOD | {f"{KEY}model": 5}, "model' is 5"),
    (_GOOD | {f"{KEY}model": ["gpt2"]}, r"model' is \['gpt2'\]"),
    (_GOOD | {f"{KEY}pre": 7}, "pre' is 7"),
    (_GOOD | {f"{KEY}tokens": None}, "tokens' is None; expected a list of texts"),
    (_GOOD | {f"{KEY}tokens": "abc"}, "tokens' is 'abc'"),
    (_GOOD | {f"{KEY}tokens": []}, "tokens' is '0 tokens'"),
    (_GOOD | {f"{KEY}tokens": range(2**23)}, "tokens' is range"),
    (_GOOD | {f"{KEY}tokens": ["a", 5]}, r"tokens\[1\]' is 5"),
    (_GOOD | {f"{KEY}tokens": ["a", b"b"]}, r"tokens\[1\]' is b'b'"),
    (_GOOD | {f"{KEY}tokens": ["a", "\udcff"]}, r"tokens\[1\]' is '\\udcff'; expected .* in UTF-8"),
    (_GOOD | {f"{KEY}eos_token_id": np.array([1, 2])}, r"eos_token_id' is \[1, 2\]"),
    (_GOOD | {f"{KEY}model": np.array([1, 2])}, r"model' is \[1, 2\]"),
    (_GOOD | {f"{KEY}tokens": ["a", "b", "a"]}, "tokens' has 'a' twice, as 0 and 2"),
    (
        _GOOD | {f"{KEY}token_type": [1]},
        "token_type' is 'a list of 1'; expected one value for each of the 260 tokens",
    ),
    (_GOOD | {f"{KEY}token_type": 3}, "token_type' is 3"),
    (_GOOD | {f"{KEY}token_type": ["1"] * 260}, r"token_type\[0\]' is '1'"),
    (_GOOD | {f"{KEY}merges": None}, "merges' is None"),
    (_GOOD | {f"{KEY}merges": ["ab"]}, r"merges\[0\]' is 'ab'; expected two tokens"),
    (_GOOD | {f"{KEY}merges": [5]}, r"merges\[0\]' is 5"),
    (_GOOD | {f"{KEY}merges": ["a b", "x qq"]}, r"merges\[1\]' is 'x qq'; expected tokens .* no 'qq'"),
    (_GOOD | {f"{KEY}merges": ["b a"]}, "which has no 'ba'"),
    (_GOOD | {f"{KEY}eos_token_id": "5"}, "eos_token_id' is '5'; expected a token id"),
    (_GOOD | {f"{KEY}eos_token_id": True}, "eos_token_id' is True"),
    (_GOOD | {f"{KEY}add_bos_token": 1}, "add_bos_token' is 1; expected true or false"),
    (_SPM | {f"{KEY}scores": [0.0]}, "scores' is 'a list of 1'"),
    (_SPM | {f"{KEY}scores": np.full(261, np.nan, np.float32)}, r"scores\[0\]' is nan"),
    (_SPM | {f"{KEY}scores": [None] * 261}, r"scores\[0\]' is None"),
    (_SPM | {f"{KEY}add_space_prefix": "no"}, "add_space_prefix' is 'no'"),
    ({**_SPM, f"{KEY}model": "t5", f"{KEY}scores": None}, "scores' is None"),
    ({**_SPM, f"{KEY}model": "t5", f"{KEY}precompiled_charsmap": [255] * 9}, "precompiled_charsmap' is"),
    ({**_SPM, f"{KEY}model": "t5", f"{KEY}precompiled_charsmap": ["a"]}, "precompiled_charsmap' is"),
    ({**_SPM, f"{KEY}model": "t5", f"{KEY}precompiled_charsmap": 9}, "precompiled_charsmap' is 9"),
    (
        {
            f"{KEY}model": "bert",
            f"{KEY}tokens": ["▁a", "[UNK]", "a", "##a"],
            f"{KEY}token_type": [1, 3, 3, 1],
        },
        "tokens' has 'a' twice",
    ),
]


@pytest.mark.parametrize(("values", "said"), HOSTILE)
def test_hostile_metadata_is_one_line_that_names_the_key(values: dict[str, Any], said: str) -> None:
    with pytest.raises(JaxchatError, match=rf"^f\.gguf: key .*{said}") as error:
        tokenizer_of(values, "f.gguf")
    assert "\n" not in str(error.value)
    assert re.search(
        r": (convert the model to GGUF again|take the model's Hugging Face files)$", str(error.value)
    )


def test_an_empty_token_gets_llama_cpps_name() -> None:
    tokenizer = tokenizer_of(_GOOD | {f"{KEY}tokens": [*_GOOD[f"{KEY}tokens"][:-1], ""]}, "f.gguf")
    assert tokenizer is not None
    assert tokenizer.added_tokens["[EMPTY_259]"] == 259
