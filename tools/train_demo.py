"""Trains the model in the box: a small story-teller that chats, from the TinyStories corpora.

Examples:
  python tools/train_demo.py --data ../shared/data/corpora --out demo-run --minutes 80
  python tools/convert.py --src demo-run/hf --dst storyteller --quant int8

The same command again goes on where it was stopped. `demo-run/hf` is an ordinary Hugging Face directory.
"""

import dataclasses
import functools
import io
import itertools
import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    # Started as a file: the packages are beside this folder, and Ctrl-C while they load just ends it.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    import matplotlib  # noqa: F401 (drawn with at the end of hours of training)
    import optax  # noqa: F401 (jaxchat.training's)
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"jaxchat: error: training needs {error.name}; pip install 'jaxchat[train]'")

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from safetensors.numpy import save_file

from jaxchat.cli.command_line import Command, catch_interrupts, exit_process, run
from jaxchat.cli.progress_bar import training_bar
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table, read_config
from jaxchat.options import Flag
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.tokenizer_files import load_tokenizer
from jaxchat.training.batches import Batch
from jaxchat.training.initial import initial_params
from jaxchat.training.tasks import Everything
from jaxchat.training.trainer import LOSS, Settings, State, Trainer
from tools.dialogues import Document, Message, make_documents
from tools.stories import Corpus, read_corpus

ROLES = ("system", "user", "assistant")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 512
LENGTHS = (96, 192, 256, 320, 416, CONTEXT)
"""Sequences are padded to the next of these: one compiled program each, and a document never sees another."""

USER_WEIGHT = 0.2
"""What the user says counts little, but counts: with reversed roles the model plays the user."""

TOPIC_WEIGHT = 5.0
"""What was asked for counts more where the story first speaks of it: else it is one word among hundreds."""

WARMUP = 0.01
DROPOUT = 0.1

_budget = functools.partial(Flag, group="Budget")
_model = functools.partial(Flag, group="Model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to train, on what, for how long."""

    data: Annotated[str, Flag(help="The folder of the corpora", example="--data corpora", value="DIR")]
    out: Annotated[
        str,
        Flag(
            help="Where tokenizer, checkpoints, loss curves and the model in Hugging Face's layout are "
            "written; a run that is there is continued",
            example="--out demo-run",
            value="DIR",
        ),
    ]
    export_only: Annotated[
        bool,
        Flag(help="Write OUT/hf from the last checkpoint and train no further", example="--export_only"),
    ] = False
    minutes: Annotated[
        float | None,
        _budget(help="Train for so many minutes in all, interruptions not counted", example="--minutes 80"),
    ] = None
    steps: Annotated[int | None, _budget(help="Train for so many steps instead", example="--steps 2000")] = (
        None
    )
    checkpoint_steps: Annotated[
        int, _budget(help="Save every so many steps", example="--checkpoint_steps 500", low=1)
    ] = 500
    width: Annotated[int, _model(help="Width, in heads of 32", example="--width 256")] = 192
    layers: Annotated[int, _model(help="Decoder layers", example="--layers 6")] = 8
    vocab: Annotated[int, _model(help="Vocabulary size", example="--vocab 4096")] = 2048
    batch_tokens: Annotated[
        int, _model(help="Tokens in a step, padding included", example="--batch_tokens 8192")
    ] = 4096
    learning_rate: Annotated[
        float, _model(help="The highest learning rate", example="--learning_rate 0.001")
    ] = 1.5e-3
    seed: Annotated[int, _model(help="Of weights, order and dialogues", example="--seed 1")] = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code: 0, 1 failure, 2 wrong usage, 130 interrupted.

    Args:
      argv: the arguments, the program's name first; None is `sys.argv`.
    """
    command = Command(usage=f"{__doc__}\n", request=Request, run=_run)
    return run(command, argv, program="python tools/train_demo.py")


def _run(request: Request, given: frozenset[str]) -> int:
    if (request.minutes is None) == (request.steps is None) and not request.export_only:
        raise UsageError("give either --minutes or --steps, e.g. --minutes 80")
    catch_interrupts()
    out = Path(request.out)
    corpus = read_corpus(Path(request.data))
    make_tokenizer(out / "tokenizer", corpus, request.vocab)
    hf = hf_config(request.width, request.layers, request.vocab)
    trainer = trainer_of(request, corpus, hf)
    try:
        if request.export_only:
            state = trainer.state
        else:
            with training_bar(every=100) as report:
                state = trainer.run(report).state
        export(state, hf, out)
        loss = trainer.evaluate()[LOSS]
        print(f"{out / 'hf'}: after {trainer.step} steps, held-out loss {loss:.3f} nats a token")
    finally:
        trainer.close()
    return 0


# --- tokenizer and configuration


def make_tokenizer(directory: Path, corpus: Corpus, size: int) -> None:
    """Trains the SentencePiece vocabulary and writes it with its chat template, unless it is there."""
    if (directory / "tokenizer_config.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    said = [m["content"] for d in make_documents(corpus, rng) for m in d.messages if m["role"] == "user"]
    texts = [*(s.text for s in corpus.train), *corpus.fragments, *(t for t in said if len(t) < 80)]
    written = io.BytesIO()  # a file's name would become part of the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.split("\n")]),
        model_writer=written,
        model_type="bpe",
        vocab_size=size,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        control_symbols=[f"<|{role}|>" for role in ROLES],
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(written.getvalue())
    names = ["<unk>", "<s>", "</s>", *(f"<|{role}|>" for role in ROLES)]
    added = {
        str(i): {
            "content": name, "special": True, "normalized": False,
            "lstrip": False, "rstrip": False, "single_word": False,
        }
        for i, name in enumerate(names)
    }  # fmt: skip
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": names[3:],
        "added_tokens_decoder": added,
        "model_max_length": CONTEXT,
        "chat_template": TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def hf_config(width: int, layers: int, vocab: int) -> dict[str, Any]:
    """`config.json` of the model: a Llama with heads of 32, two query heads to a key/value head."""
    if width % 64:
        raise UsageError(f"--width is {width}; expected a multiple of 64")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": -(-width * 8 // 3 // 32) * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# --- documents -> batches


class Encoder:
    """Documents as token ids with a weight each."""

    def __init__(self, directory: Path):
        self.tokenizer = load_tokenizer(directory)
        template = ChatTemplate.load(directory, self.tokenizer)
        assert template is not None  # make_tokenizer writes one
        self.template = template

    def __call__(self, document: Document) -> tuple[list[int], list[float]]:
        """Ids and weights: 1 for text and what the assistant says, less for the user, 0 for the rest.

        More for the first two mentions of what a story was asked to be about.
        """
        if not document.messages:
            ids = self.tokenizer.encode(document.text) + list(self.tokenizer.eos_ids)
            return ids, [0.0] + [1.0] * (len(ids) - 1)
        text = self.template.render(list(document.messages))
        ids = self.tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        roles = {self.tokenizer.special_tokens[f"<|{role}|>"]: role for role in ROLES}
        weight = {"system": 0.0, "user": USER_WEIGHT, "assistant": 1.0}
        weights, current = [], 0.0
        for token in ids:
            weights.append(0.0 if token in roles else current)
            if token in roles:
                current = weight[roles[token]]
        ends = np.cumsum([len(self.tokenizer.token_bytes(token)) for token in ids])
        for start, stop in _mentions(text, document.messages):
            for i in range(np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop) + 1):
                weights[i] = TOPIC_WEIGHT
        return ids, weights


def _mentions(text: str, messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """Where in a rendered conversation, in UTF-8 bytes, a story first mentions what it was asked for."""
    at = 0
    for message in messages:
        at = text.index(message["content"], at)
        for thing in message.get("asked", ()):
            found = re.finditer(rf"\b{thing}\b", message["content"], re.IGNORECASE)
            for match in itertools.islice(found, 2):
                start = len(text[: at + match.start()].encode())
                yield start, start + len(match[0].encode())
        at += len(message["content"])


def batches(documents: Sequence[Document], encode: Encoder, tokens: int, rng: random.Random) -> list[Batch]:
    """Documents of about the same length together, the batches in random order; too long ones are cut."""
    rows = sorted((encode(d) for d in documents), key=lambda row: len(row[0]))
    result = []
    start = 0
    for length in LENGTHS:
        stop = len(rows) if length == CONTEXT else next(
            (i for i in range(start, len(rows)) if len(rows[i][0]) > length), len(rows)
        )  # fmt: skip
        size = max(1, tokens // length)
        group = rows[start:stop]
        rng.shuffle(group)
        for first in range(0, len(group), size):
            result.append(_batch(group[first : first + size], size, length))
        start = stop
    rng.shuffle(result)
    return result


def _batch(rows: Sequence[tuple[list[int], list[float]]], size: int, length: int) -> Batch:
    """Rows that are missing are padding too, so that a length has one shape."""
    tokens, weights = np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
    for row, (ids, own) in enumerate(rows):
        count = min(len(ids), length)
        tokens[row, :count], weights[row, :count] = ids[:count], own[:count]
    return Batch(tokens, weights, np.zeros_like(tokens), ())


# --- the run


class Epochs:
    """The batches of every epoch: its dialogues are made anew."""

    def __init__(self, corpus: Corpus, encode: Encoder, tokens: int, seed: int):
        self._corpus, self._encode, self._tokens, self._seed = corpus, encode, tokens, seed

    def epoch(self, number: int) -> list[Batch]:
        """See `training.trainer.Data`."""
        rng = random.Random(f"{self._seed}/{number}")
        return batches(make_documents(self._corpus, rng), self._encode, self._tokens, rng)


class HeldOut:
    """The stories that are not trained on, as plain text."""

    def __init__(self, corpus: Corpus, encode: Encoder, tokens: int):
        documents = [Document((), story.text) for story in corpus.held_out]
        self._batches = batches(documents, encode, tokens, random.Random(0))

    def epoch(self, number: int) -> list[Batch]:
        """See `training.trainer.Data`."""
        return self._batches


def trainer_of(request: Request, corpus: Corpus, hf: dict[str, Any]) -> Trainer:
    """The run in a directory, gone on with where its last checkpoint is."""
    out, config = Path(request.out), read_config(hf)
    encode = Encoder(out / "tokenizer")
    if encode.tokenizer.vocab_size != config.vocab_size:
        raise JaxchatError(f"{out}: its vocabulary is not {config.vocab_size}; give another --out")
    initial = initial_params(config, jax.random.key(request.seed))
    return Trainer(
        Everything(config, jnp.dtype(jnp.float32), DROPOUT),
        frozen=(),
        initial=initial,
        decayed={param.name: param.role not in ("norm", "bias") for param in parameter_table(config)},
        data=Epochs(corpus, encode, request.batch_tokens, request.seed),
        held_out=HeldOut(corpus, encode, request.batch_tokens),
        settings=Settings(
            max_steps=request.steps,
            max_minutes=request.minutes,
            learning_rate=request.learning_rate,
            schedule="warmup_stable_decay",
            warmup_ratio=WARMUP,
            weight_decay=0.1,
            beta2=0.98,
            eval_steps=200,
            save_steps=request.checkpoint_steps,
            evaluates=True,
        ),
        directory=out,
        identity={"model": hf, "seed": request.seed, "batch_tokens": request.batch_tokens},
        resume=True,
    )


def export(state: State, config: dict[str, Any], out: Path) -> None:
    """Writes the model in Hugging Face's layout."""
    target, model = out / "hf", read_config(config)
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(out / "tokenizer" / name, target / name)
    _write_json(target / "config.json", config)
    _write_json(
        target / "generation_config.json",
        {
            "bos_token_id": 1, "eos_token_id": 2, "do_sample": True,
            "temperature": 0.5, "top_k": 40, "top_p": 0.95, "max_new_tokens": 400,
        },
    )  # fmt: skip
    tensors = {}
    for param in parameter_table(model):
        array = np.asarray(state.trained[param.name])
        for layer in range(model.num_layers if param.per_layer else 1):
            values = array[layer] if param.per_layer else array
            tensors[_hf_name(param.hf, layer)] = np.ascontiguousarray(values)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _hf_name(pattern: str, layer: int) -> str:
    name = pattern.format(layer)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


if __name__ == "__main__":
    exit_process(main())
