"""What text becomes which ids, for every kind of tokenizer file, against other implementations' vectors."""

import base64
import functools
import gzip
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.text import tokenizer_json
from jaxchat.text.tokenizer import Detokenizer, unused_marks
from jaxchat.text.tokenizer_files import has_tokenizer, load_tokenizer
from tests.support import real_chats

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TOKENIZERS = DATA / "tokenizers"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real tokenizers are not at {DATA}")

# Name -> the files of a tokenizer directory, as (source below shared/data, name in the directory).
FILES = {
    "llama2": [("tokenizers/llama2/tokenizer.model", "tokenizer.model")],
    "llama3": [("tokenizers/llama3/tokenizer.model", "tokenizer.model")],
    "llama2-json": [("tokenizers/llama_swift/tokenizer.json", "tokenizer.json")],
    "gpt2": [("tokenizers/gpt2/tokenizer.json", "tokenizer.json")],
    "gpt2-vocab": [
        ("tokenizers/gpt2/vocab.json", "vocab.json"),
        ("tokenizers/gpt2/merges.txt", "merges.txt"),
    ],
    "gpt-neox": [("tokenizers/gpt-neox/20B_tokenizer.json", "tokenizer.json")],
    "falcon": [("tokenizers/falcon-tokenizer/tokenizer.json", "tokenizer.json")],
    "deepseek-r1": [("tokenizers/deepseek-r1/tokenizer.json.gz", "tokenizer.json")],
    "t5": [
        ("tokenizers/t5-small/tokenizer.json", "tokenizer.json"),
        ("tokenizers/t5-small/tokenizer_config.json", "tokenizer_config.json"),
    ],
    "whisper": [
        ("tokenizers/whisper.tiny/tokenizer.json", "tokenizer.json"),
        ("tokenizers/whisper.tiny/tokenizer_config.json", "tokenizer_config.json"),
    ],
    "phi-3": [
        ("tokenizers/phi-3/tokenizer.json", "tokenizer.json"),
        ("tokenizers/phi-3/tokenizer_config.json", "tokenizer_config.json"),
    ],
    "minueza": [
        ("tokenizers/mistral-minueza-chat/tokenizer.json", "tokenizer.json"),
        ("tokenizers/mistral-minueza-chat/tokenizer_config.json", "tokenizer_config.json"),
        ("tokenizers/mistral-minueza-chat/config.json", "config.json"),
    ],
    "minueza-model": [
        ("tokenizers/mistral-minueza-chat/tokenizer.model", "tokenizer.model"),
        ("tokenizers/mistral-minueza-chat/tokenizer_config.json", "tokenizer_config.json"),
    ],
    "mistral-v3": [("tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model")],
    "qwen2.5": [
        ("tokenizers/qwen2/vocab.json", "vocab.json"),
        ("tokenizers/qwen2/merges.txt", "merges.txt"),
        ("tokenizers/qwen2/Qwen2.5-0.5B-Instruct.tokenizer_config.json", "tokenizer_config.json"),
    ],
    "spm-unigram": [("tokenizers/spm-unigram/test_model.model", "tokenizer.model")],
    "tinystories": [
        ("models/TinyStories-656K/bf16/tokenizer.json", "tokenizer.json"),
        ("models/TinyStories-656K/bf16/tokenizer_config.json", "tokenizer_config.json"),
        ("models/TinyStories-656K/bf16/special_tokens_map.json", "special_tokens_map.json"),
    ],
    "craftgpt": [
        ("models/CraftGPT-hf/tokenizer.json", "tokenizer.json"),
        ("models/CraftGPT-hf/tokenizer_config.json", "tokenizer_config.json"),
    ],
    "stories260k": [
        ("models/stories260K-hf/tokenizer.model", "tokenizer.model"),
        ("models/stories260K-hf/tokenizer_config.json", "tokenizer_config.json"),
    ],
}


@pytest.fixture(scope="session")
def directory_of(tmp_path_factory):
    """name -> a directory with that tokenizer's files."""

    @functools.cache
    def build(name):
        folder = tmp_path_factory.mktemp(name)
        for source, target in FILES[name]:
            if not (DATA / source).is_file():
                pytest.skip(f"no {DATA / source}")
            if source.endswith(".gz"):
                (folder / target).write_bytes(gzip.decompress((DATA / source).read_bytes()))
            else:
                shutil.copy(DATA / source, folder / target)
        return folder

    return build


@pytest.fixture(scope="session")
def tokenizer_of(directory_of):
    return functools.cache(lambda name: load_tokenizer(directory_of(name)))


def pieces(tokenizer, ids, **kwargs):
    detokenizer = Detokenizer(tokenizer, **kwargs)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


# --- against llama.cpp


def gguf_vectors(name):
    """llama.cpp's tests/test-tokenizer-0: texts, and their ids (all these files were made without BOS)."""
    folder = DATA / "vocab-gguf"
    texts = (
        (folder / f"ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    )
    lines = (folder / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    assert len(lines) >= 40
    # The separator also ends the last text, which leaves one empty text without a line.
    assert len(texts) in (len(lines), len(lines) + 1)
    return list(zip(texts, ([int(i) for i in line.split()] for line in lines), strict=False))


@needs_data
@pytest.mark.parametrize(
    ("vectors", "name"),
    [
        ("llama-spm", "llama2"),
        ("llama-spm", "llama2-json"),
        ("llama-bpe", "llama3"),
        ("gpt-2", "gpt2"),
        ("gpt-2", "gpt2-vocab"),
        ("phi-3", "phi-3"),
        ("qwen2", "qwen2.5"),
        ("deepseek-r1-qwen", "qwen2.5"),  # the distilled Qwen keeps Qwen2's vocabulary and pre-tokenizer
        ("falcon", "falcon"),
    ],
)
def test_ids_equal_llama_cpp(vectors, name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    for text, ids in gguf_vectors(vectors):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)


# --- against swift-transformers' vectors (made with transformers)

SWIFT = {
    "coreml-projects/Llama-2-7b-chat-coreml": ["llama2", "llama2-json"],
    "distilgpt2": ["gpt2", "gpt2-vocab"],
    "tiiuae/falcon-7b": ["falcon"],
    "t5-base": ["t5"],
    "pcuenq/Llama-3.2-1B-Instruct-tokenizer": ["llama3"],
    "openai/whisper-large-v2": ["whisper"],
    # Without a tokenizer file here: bert, distilbert, gemma, whisper-tiny.en (not whisper-tiny's vocabulary).
}


@needs_data
@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in SWIFT.items() for name in names])
def test_ids_and_text_equal_swift_transformers(key, name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    cases = json.loads((DATA / "oracles/tokenizers-swift/tokenizer_tests.json").read_text())[key]
    for case in cases:
        ids = case["encoded"]["input_ids"]
        assert tokenizer.encode(case["input"], parse_special=True) == ids
        if "'ll !!" in case["input"]:
            # Decoded with clean_up_tokenization_spaces, which deletes the space before "!!" from the text.
            continue
        assert tokenizer.decode(ids) == case["decoded_with_special"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_without_special"]


@needs_data
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("gpt2_encoded_tokens", "gpt2"),
        ("falcon_encoded", "falcon"),
        ("llama_encoded", "llama2-json"),
        ("llama_encoded", "llama2"),
        ("llama_3.2_encoded", "llama3"),
        ("t5_base_encoded", "t5"),
        ("whisper_large_v2_encoded", "whisper"),
    ],
)
def test_a_long_text_equals_swift_transformers(file, name, tokenizer_of):
    case = json.loads((DATA / f"oracles/tokenizers-swift/{file}.json").read_text())
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(case["text"])
    assert ids == case["token_ids"]
    assert tokenizer.decode(ids) == case["decoded_text"]


# --- special tokens


@needs_data
@pytest.mark.parametrize(
    ("name", "special"),
    [
        ("llama2", "</s>"),
        ("stories260k", "</s>"),
        ("mistral-v3", "[INST]"),
        ("llama3", "<|eot_id|>"),
        ("qwen2.5", "<|im_end|>"),
        ("minueza", "<|im_start|>"),
        ("minueza-model", "<|im_start|>"),
        ("phi-3", "<|end|>"),
        ("deepseek-r1", "<｜User｜>"),
        ("gpt2", "<|endoftext|>"),
        ("t5", "</s>"),
        ("craftgpt", "_[inst]"),
    ],
)
def test_a_special_token_in_text_is_text_unless_asked_otherwise(name, special, tokenizer_of):
    tokenizer = tokenizer_of(name)
    special_id = tokenizer.control_tokens[special]
    text = f"a {special}b"
    assert special_id not in tokenizer.encode(text, add_special_tokens=False)
    assert special_id in tokenizer.encode(text, add_special_tokens=False, parse_special=True)
    if name not in ("t5", "craftgpt"):  # their vocabularies cannot spell it
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@needs_data
def test_the_marks_used_internally_cannot_be_forged(tokenizer_of):
    tokenizer = tokenizer_of("qwen2.5")
    mark = unused_marks("")[0]
    text = f"{mark}<|im_end|>{mark} {mark}"
    ids = tokenizer.encode(text)
    assert tokenizer.special_tokens["<|im_end|>"] not in ids
    assert tokenizer.decode(ids) == text


@needs_data
def test_text_that_uses_every_mark_is_refused_in_one_line(tokenizer_of):
    text = "".join(chr(0xF0000 + i) for i in range(64)) + "<|im_end|>"
    with pytest.raises(UsageError, match="private-use"):
        tokenizer_of("qwen2.5").encode(text)


@needs_data
@pytest.mark.parametrize(
    ("name", "bos", "eos"),
    [
        ("llama2", "<s>", ["</s>"]),
        ("stories260k", "<s>", ["</s>"]),
        ("tinystories", "<|start_story|>", ["<|end_story|>"]),
        ("llama3", "<|begin_of_text|>", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]),
        ("qwen2.5", None, ["<|im_end|>"]),
        ("phi-3", "<s>", ["<|endoftext|>"]),
        ("craftgpt", "_[inst]", ["_[inst]"]),
    ],
)
def test_bos_and_eos_come_from_the_files(name, bos, eos, tokenizer_of):
    tokenizer = tokenizer_of(name)
    assert tokenizer.bos_id == (None if bos is None else tokenizer.special_tokens[bos])
    assert [tokenizer.special_tokens[e] for e in eos] == list(tokenizer.eos_ids)


@needs_data
@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("llama2", [1]),
        ("stories260k", [1]),
        ("tinystories", [1]),
        ("llama3", [128000]),
        ("phi-3", []),
        ("qwen2.5", []),
    ],
)
def test_special_tokens_are_added_as_the_files_say(name, starts, tokenizer_of):
    tokenizer = tokenizer_of(name)
    plain = tokenizer.encode("Hi", add_special_tokens=False)
    assert tokenizer.encode("Hi") == starts + plain


@needs_data
def test_llama3_special_tokens_have_their_published_ids(tokenizer_of):
    special = tokenizer_of("llama3").special_tokens
    assert len(special) == 256
    assert special["<|start_header_id|>"] == 128006
    assert special["<|eot_id|>"] == 128009
    assert special["<|reserved_special_token_2|>"] == 128005
    assert special["<|reserved_special_token_247|>"] == 128255


@needs_data
def test_stories260k_has_512_ids_and_tinystories_2048(tokenizer_of):
    assert tokenizer_of("stories260k").vocab_size == 512
    assert tokenizer_of("tinystories").vocab_size == 2048


@needs_data
def test_a_user_defined_symbol_called_special_is_not_made_from_text(directory_of, tmp_path):
    """Gemma's <start_of_turn> is such a symbol: SentencePiece itself would turn the text into it."""
    from jaxchat.text.tokenizer_sentencepiece import _encode_varint

    def piece(text, kind):
        body = b"\x0a" + _encode_varint(len(text)) + text + b"\x15\0\0\0\0\x18" + bytes([kind])
        return b"\x0a" + _encode_varint(len(body)) + body

    proto = (directory_of("llama2") / "tokenizer.model").read_bytes() + piece(b"<start_of_turn>", 4)
    (tmp_path / "tokenizer.model").write_bytes(proto)
    as_text = load_tokenizer(tmp_path)
    assert 32000 in as_text.encode("x<start_of_turn>y")
    config = {"added_tokens_decoder": {"32000": {"content": "<start_of_turn>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert 32000 not in tokenizer.encode("x<start_of_turn>y")
    assert tokenizer.encode("x<start_of_turn>y", parse_special=True).count(32000) == 1


# --- the middle of a text


@needs_data
@pytest.mark.parametrize(
    "name", ["llama2", "minueza", "minueza-model", "phi-3", "llama3", "qwen2.5", "mistral-v3"]
)
@pytest.mark.parametrize("rest", ["hello", " hello", "\n\nhello", "</s>x", ".", "  two"])
def test_a_continuation_is_tokenized_as_in_the_whole(name, rest, tokenizer_of):
    """Cut after a special token: both parts joined are the whole's ids, whatever prefix is added."""
    tokenizer = tokenizer_of(name)
    special = next(t for t in tokenizer.special_tokens if t not in ("<unk>",))
    head = f"text{special}"
    first = tokenizer.encode_after(head)
    whole = tokenizer.encode(head + rest, add_special_tokens=False, parse_special=True)
    assert first + tokenizer.encode_after(rest, after=first[-1]) == whole


@needs_data
@pytest.mark.parametrize("name", ["llama2", "minueza", "llama3", "qwen2.5"])
def test_a_continuation_of_plain_text_gets_no_dummy_space(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    first = tokenizer.encode_after("Hello")
    assert tokenizer.decode(first + tokenizer.encode_after("world", after=first[-1])) == "Helloworld"


@needs_data
@pytest.mark.parametrize(
    "name", ["llama2", "minueza", "phi-3", "qwen2.5", "deepseek-r1", "mistral-v3", "llama2-json"]
)
def test_a_broken_special_token_is_text_beside_real_ones(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    special = sorted(tokenizer.special_tokens)[-1]
    breaker = unused_marks("")[0]
    broken = special[0] + breaker + special[1:]
    ids = tokenizer.encode_after(f"{special}a{broken}b", breaker=breaker)
    assert ids.count(tokenizer.special_tokens[special]) == 1
    assert ids[0] == tokenizer.special_tokens[special]
    assert tokenizer.decode(ids[1:], skip_special_tokens=True) == f"a{special}b"


# --- decoding

TEXTS = [
    "Hello world",
    " leading space",
    "  two  spaces   three",
    "line\nbreaks\n\n\tand tabs ",
    "naïve café — 你好，世界 🙂👩‍👩‍👧‍👦 नमस्ते",
    "日本語のテキスト",
    "",
    "\U000f0000 private use",
]
LOSSLESS = [
    "llama2",
    "llama2-json",
    "minueza",
    "phi-3",
    "mistral-v3",
    "llama3",
    "qwen2.5",
    "deepseek-r1",
    "gpt2",
]


@needs_data
@pytest.mark.parametrize("name", [*LOSSLESS, "falcon", "gpt-neox", "gpt2-vocab"])
def test_decoding_gives_the_text_back(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert "".join(pieces(tokenizer, ids)) == text


@needs_data
@pytest.mark.parametrize("name", ["llama2", "stories260k", "phi-3", "gpt2"])
def test_an_emoji_appears_whole(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode("a🙂b", add_special_tokens=False)
    assert len(ids) > 3
    assert [p for p in pieces(tokenizer, ids) if p] == ["a", "🙂", "b"]


@needs_data
def test_an_unfinished_character_is_shown_at_the_end_only(tokenizer_of):
    tokenizer = tokenizer_of("llama2")
    ids = tokenizer.encode("🙂", add_special_tokens=False)[:-1]
    assert pieces(tokenizer, ids)[-1] == "\ufffd"
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@needs_data
@pytest.mark.parametrize("name", sorted(FILES))
def test_pieces_joined_are_the_decoded_text_for_any_ids(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    low = st.integers(0, min(tokenizer.vocab_size + 20, 400))  # bytes, special tokens and unused ids are here
    ids = st.lists(st.one_of(low, st.integers(0, tokenizer.vocab_size + 20)), max_size=12)

    @settings(max_examples=20, suppress_health_check=list(HealthCheck))
    @given(ids=ids, skip=st.booleans())
    def check(ids, skip):
        joined = "".join(pieces(tokenizer, ids, skip_special_tokens=skip))
        assert joined == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


@needs_data
@pytest.mark.parametrize(
    "name", ["minueza", "phi-3", "llama3", "qwen2.5", "deepseek-r1", "gpt2", "falcon", "craftgpt"]
)
def test_decoding_equals_the_tokenizers_library(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    backend = tokenizer._backend
    specials = list(tokenizer.special_tokens)

    @settings(max_examples=20, suppress_health_check=list(HealthCheck))
    @given(parts=st.lists(st.one_of(st.text(max_size=6), st.sampled_from([" ", "\n", "é", "🙂", *specials]))))
    def check(parts):
        ids = tokenizer.encode("".join(parts), parse_special=True)
        for skip in (False, True):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == backend.decode(
                ids, skip_special_tokens=skip
            )

    check()


@needs_data
def test_a_continuation_keeps_the_space_of_its_first_word(tokenizer_of):
    tokenizer = tokenizer_of("llama2")
    prompt, rest = tokenizer.encode("Once upon"), tokenizer.encode("a time", add_special_tokens=False)
    assert "".join(pieces(tokenizer, rest, prompt_ids=prompt)) == " a time"
    assert "".join(pieces(tokenizer, rest, prompt_ids=[tokenizer.bos_id])) == "a time"


@needs_data
def test_a_reply_after_a_special_token_has_no_dummy_space_where_the_tokenizer_adds_one(tokenizer_of):
    tokenizer = tokenizer_of("phi-3")
    ids = tokenizer.encode("<|assistant|>Hello", parse_special=True)
    assert "".join(pieces(tokenizer, ids[1:], prompt_ids=[450, ids[0]])) == "Hello"
    tokenizer = tokenizer_of("craftgpt")
    ids = tokenizer.encode("hi_[/inst]hello", parse_special=True)
    assert "".join(pieces(tokenizer, ids[-1:], prompt_ids=ids[:-1])) == "hello"


@needs_data
def test_a_character_split_between_prompt_and_continuation_is_completed(tokenizer_of):
    tokenizer = tokenizer_of("llama2")
    ids = tokenizer.encode("x🙂y")
    assert "".join(pieces(tokenizer, ids[-2:], prompt_ids=ids[:-2])) == "🙂y"


class WordTokenizer:
    """A tokenizer that is nothing but the protocol."""

    vocab_size, bos_id, eos_ids, special_tokens = 3, None, (), {}

    def encode(self, text, *, add_special_tokens=True, parse_special=False):
        return [["a", "b", "c"].index(w) for w in text.split()]

    def decode(self, ids, *, skip_special_tokens=False):
        return " ".join("abc"[i] for i in ids)


def test_any_tokenizer_can_be_decoded_incrementally():
    assert pieces(WordTokenizer(), [0, 1, 2]) == ["a", " b", " c", ""]
    assert pieces(WordTokenizer(), [1], prompt_ids=[0]) == [" b", ""]


# --- errors


def one_line(excinfo, *words):
    message = str(excinfo.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_directory_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError) as excinfo:
        load_tokenizer(tmp_path / "nowhere")
    one_line(excinfo, "nowhere", "no such directory")


def test_a_directory_without_tokenizer_says_which_files_are_expected(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(JaxchatError) as excinfo:
        load_tokenizer(tmp_path)
    one_line(excinfo, str(tmp_path), "tokenizer.json", "tokenizer.model")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}', "\x00\xff"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_a_corrupt_tokenizer_names_the_file(tmp_path, content, file):
    (tmp_path / file).write_text(content)
    assert has_tokenizer(tmp_path)
    with pytest.raises(JaxchatError) as excinfo:
        load_tokenizer(tmp_path)
    one_line(excinfo, file)


def test_an_unknown_rank_file_names_the_alternative(tmp_path):
    lines = [base64.b64encode(bytes([b])).decode() + f" {b}" for b in range(256)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    with pytest.raises(JaxchatError) as excinfo:
        load_tokenizer(tmp_path)
    one_line(excinfo, "256", "tokenizer.json")


@pytest.mark.parametrize("content", ["{", "[1]", '{"added_tokens_decoder": {"x": {"content": "a"}}}'])
def test_a_broken_configuration_names_the_file(tmp_path, content):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(JaxchatError) as excinfo:
        load_tokenizer(tmp_path)
    one_line(excinfo, "tokenizer_config.json")


# --- against transformers

PARITY_TEXTS = [
    "Hello world",
    "two  spaces   and three",
    "line\nbreaks\n\nand\ttabs",
    "trailing space ",
    "naïve café 你好 🙂",
    "a</s>b <s> c",
    "x <|im_start|>user\nhi<|im_end|>\ny <|user|>\nhi<|end|>\n",
    "<|start_story|>Once<|end_story|>",
    "",
]
LEADING_SPACE = [" leading", "   three", "\n newline first"]


@needs_data
@pytest.mark.parity
@pytest.mark.parametrize("name", ["minueza", "phi-3", "qwen2.5", "gpt2", "falcon", "craftgpt", "tinystories"])
def test_ids_equal_transformers(name, directory_of, tokenizer_of):
    """With transformers' generic class, which reads the file as it is (see the next test)."""
    transformers = pytest.importorskip("transformers")
    folder = str(directory_of(name))
    has_json = (directory_of(name) / "tokenizer.json").is_file()
    kind = transformers.PreTrainedTokenizerFast if has_json else transformers.AutoTokenizer
    compare_with_transformers(tokenizer_of(name), kind.from_pretrained(folder), PARITY_TEXTS + LEADING_SPACE)


@needs_data
@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama2", "stories260k"])
def test_ids_equal_transformers_llama_class(name, directory_of, tokenizer_of):
    """With transformers 5's LlamaTokenizer, on texts without runs of spaces or a leading one.

    It rebuilds merges and normalizer from the vocabulary alone; on those texts it differs from SentencePiece,
    llama.cpp's vectors and the tokenizer.json of Llama-2, all of which this project equals.
    """
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaTokenizer.from_pretrained(
        str(directory_of(name)), add_bos_token=True, legacy=name == "stories260k"
    )
    texts = [t for t in PARITY_TEXTS if "  " not in t and not t.endswith(" ")]
    compare_with_transformers(tokenizer_of(name), reference, texts)


@needs_data
@pytest.mark.parity
def test_a_llama2_model_file_equals_its_tokenizer_json_in_transformers(directory_of, tokenizer_of):
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory_of("llama2-json")))
    for text in PARITY_TEXTS + LEADING_SPACE:
        if "<s>" not in text:  # in this old file special tokens match only after a space
            assert tokenizer_of("llama2").encode(text) == reference.encode(text)


def compare_with_transformers(tokenizer, reference, texts):
    for text in texts:
        for special in (False, True):
            ids = reference.encode(text, add_special_tokens=special)
            assert tokenizer.encode(text, parse_special=True, add_special_tokens=special) == ids, repr(text)
        # In tinystories special tokens match normalized text; the tokenizers library then never skips them.
        normalized = any(t.normalized for t in reference.added_tokens_decoder.values())
        for skip in (False,) if normalized else (False, True):
            expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected, repr(text)


@needs_data
@pytest.mark.parametrize(
    "name", ["qwen2.5", *(pytest.param(name, marks=pytest.mark.full) for name in ("llama-3.1", "qwen3"))]
)
def test_control_tokens_are_renamed_over_the_same_vocabulary_as_in_a_copy(name):
    tokenizer, _, _ = real_chats.load(name)
    mark = "\U000f0000"
    names = {token: f"{mark}{token}{mark}" for token in tokenizer.control_tokens}
    shared = tokenizer_json._renamed_over_same_model(tokenizer._backend, names)
    copy = tokenizer_json._renamed_copy(tokenizer._backend, names)
    first = list(names)[:3]
    others = ["Hel", "lo", " wor", "  ", "\n", "é🙂", "12", "<|"]
    words = [*first, *map(names.get, first), *tokenizer.added_tokens, *others]

    @given(st.lists(st.sampled_from(words), max_size=8).map("".join), st.booleans())
    def check(text, special):
        ids = [t.encode(text, add_special_tokens=special).ids for t in (shared, copy)]
        assert ids[0] == ids[1]

    check()
