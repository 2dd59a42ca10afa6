"""How a GGUF file's `tokenizer.ggml.pre` says that text is cut before byte-pair merges: names as data.

The patterns are those published with the models (their tokenizer.json, or tiktoken's `pat_str`), in
Oniguruma's syntax; the names and which of them belong together are llama.cpp's (src/llama-vocab.cpp). How a
tokenizer is made of them is in `tokenizer_gguf_spec.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How text is cut, and what else the name implies.

    Attributes:
        patterns: regexes, each applied to what the one before has left whole; matches and gaps are pieces.
        ignore_merges: a piece that is a token is that token, whatever the merges say.
        adds_bos: a text begins with BOS, where the file does not say.
        defaults_bos: where the file names no BOS, llama.cpp's default is one.
        byte_level: tokens spell bytes as GPT-2 does; otherwise they are text, with `▁` for a space.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    defaults_bos: bool = True
    byte_level: bool = True


_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
_END = r"\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_END}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_SIGNS}|{_END}"
_QWEN35 = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_END}"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
# Words that end in lower case, then words in upper case: GPT-4o's.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(
    contractions: str, digits: str, *, upper: str = _UPPER, lower: str = _LOWER, end: str = "/"
) -> str:
    head = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{head}{upper}*{lower}+{contractions}|{head}{upper}+{lower}*{contractions}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{end}]*|\s*[\r\n]+|{_END}"
    )


_TEKKEN = _cased("", r"\p{N}")
_GPT4O = _cased(rf"{_SHORT}?", r"\p{N}{1,3}")
_HAN_FREE = {"upper": _UPPER[:-1] + r"&&[^\p{Han}]]", "lower": _LOWER[:-1] + r"&&[^\p{Han}]]"}
_KIMI = r"[\p{Han}]+|" + _cased(rf"{_SHORT}?", r"\p{N}{1,3}", **_HAN_FREE, end="")

_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


def _of(code_points: str) -> str:
    """A class of characters by hexadecimal ranges: several have twins that editors turn them into."""
    ranges = (part.split("-") for part in code_points.split())
    return "[" + "".join("-".join(chr(int(end, 16)) for end in ends) for ends in ranges) + "]"


_HAN_KANA = _of("4E00-9FA5 3040-309F 30A0-30FF") + "+"
_DEEPSEEK3_HEAD = (r"\p{N}{1,3}", _HAN_KANA)
_DEEPSEEK3_WORDS = _PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_DEEPSEEK3 = rf"{_DEEPSEEK3_WORDS}[\r\n]*|\s*[\r\n]+|{_END}"
_DEEPSEEK_LETTERS = (
    r"\s?"
    + _of(
        "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F "
        "386 388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD "
        "1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 "
        "1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
        "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 "
        "2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 "
        "2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 "
        "A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
        "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
    )
    + "+"
)
_DEEPSEEK_SIGNS = r"\s?" + _of("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002") + "+"
_DEEPSEEK_HAN = _of("4E00-9FA5 800-4E00 AC00-D7FF") + "+"
_AFMOE_SCRIPTS = (
    _of(
        "4E00-9FFF 3400-4DBF F900-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF 1780-17FF "
        "1000-109F AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF"
    )
    + "+"
)
_YOUTU_SCRIPTS = "|".join(
    _of(code_points) + "+"
    for code_points in (
        "AC00-D7A3 3131-318E",
        "FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F",
        "3105-312F",
        "4E00-9FA5 3040-309F 30A0-30FF",
    )
)
_LINES = r"[^\n]+|[\n]+"


def _each(*patterns: str, ignore_merges: bool = False, adds_bos: bool = False) -> PreTokenizer:
    return PreTokenizer(patterns=patterns, ignore_merges=ignore_merges, adds_bos=adds_bos)


DEFAULT = _each(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
"""What llama.cpp takes where a file names none."""

# One line a class; the names that share it follow.
_CLASSES: tuple[tuple[PreTokenizer, str], ...] = (
    (DEFAULT, "default"),
    (
        _each(_LLAMA3, ignore_merges=True, adds_bos=True),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    (_each(_LLAMA3), "dbrx smaug-bpe"),
    (PreTokenizer(patterns=(_LLAMA3,), defaults_bos=False), "glm4 glm5 chatglm-bpe"),
    (_each(_TEKKEN, ignore_merges=True, adds_bos=True), "tekken"),
    (
        _each(_GPT2),
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en "
        "jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling exaone4",
    ),
    (
        _each(r"\p{N}", _GPT2),
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    ),
    (
        _each(_QWEN2),
        "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan megrez solar-open grok-2",
    ),
    (_each(_QWEN35), "qwen35"),
    (_each(_QWEN2.removeprefix(f"{_SHORT}|")), "ufakzeka"),
    (_each(_LINES, _QWEN2), "laguna"),
    (_each(_GPT4O), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (
        _each(
            _cased(rf"{_SHORT}?", r"\p{N}{1,3}"),
            ignore_merges=True,
        ),
        "granite-embed-multi-97m",
    ),
    (_each(_KIMI), "kimi-k2"),
    (_each(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O), "tiny_aya cohere2moe"),
    (
        _each("[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_SIGNS, r"\s+$", _DEEPSEEK_HAN, r"\p{N}+"),
        "deepseek-llm",
    ),
    (_each("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}"), "deepseek-coder"),
    (_each(*_DEEPSEEK3_HEAD, _DEEPSEEK3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (_each(*_DEEPSEEK3_HEAD, rf"{_DEEPSEEK3_WORDS}|[\r\n]|{_END}", r"\p{N}"), "spark2_5"),
    (
        _each(
            _YOUTU_SCRIPTS,
            _cased(rf"{_SHORT}?", r"\p{N}"),
            ignore_merges=True,
        ),
        "youtu",
    ),
    (_each(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"), "falcon"),
    (_each(_BLOOM), "bloom poro-chat gpt3-finnish"),
    (_each(_BLOOM, r"\p{N}"), "viking"),
    (
        _each(
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
            adds_bos=True,
        ),
        "chameleon",
    ),
    (_each(r"\p{N}+", r"(?=(\d{3})+(?!\d))"), "superbpe"),
    (
        _each(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
            + _END
        ),
        "bailingmoe bailingmoe2 llada-moe",
    ),
    (
        _each(rf"{_SHORT}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_END}"),
        "seed-coder",
    ),
    (
        _each(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _AFMOE_SCRIPTS, _DEEPSEEK3),
        "afmoe",
    ),
    (
        _each(
            rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_END}"
        ),
        "exaone-moe",
    ),
    (
        _each(
            rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}"
            + "".join(
                rf"|\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")
            )
            + r"|\s{1}"
        ),
        "jais-2",
    ),
    (
        _each(r"\p{N}{1,3}", rf"{_SHORT}|{_WORD}|\p{{N}}+|{_SIGNS}|{_END}", ignore_merges=True),
        "minicpm5",
    ),
    (PreTokenizer(patterns=(_LINES,), byte_level=False, adds_bos=True), "gemma4 granite-embed-multi-311m"),
    (PreTokenizer(patterns=(_LINES,), byte_level=False), "sarvam-moe"),
)

PRE_TOKENIZERS = {name: pre for pre, names in _CLASSES for name in names.split()}
"""By the value of `tokenizer.ggml.pre`."""
