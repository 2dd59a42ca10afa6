"""Trains the model in the box: a small story-teller that chats, from the TinyStories corpora.

Examples:
  python tools/train_demo.py --data ../shared/data/corpora --out demo-run --minutes 80
  python tools/convert.py --src demo-run/hf --dst storyteller --quant int8

The same command again goes on where it was stopped. `demo-run/hf` is an ordinary Hugging Face directory.
"""

import contextlib
import csv
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
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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
import orbax.checkpoint as ocp
import sentencepiece
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save_file

from jaxchat.cli.command_line import Command, catch_interrupts, exit_process, run
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table, read_config
from jaxchat.options import Flag
from jaxchat.text.chat_template import ChatTemplate
from jaxchat.text.tokenizer_files import load_tokenizer
from jaxchat.training import steps
from jaxchat.training.steps import Batch, State
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

WARMUP_STEPS = 100
DECAY = 0.3
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
    checkpoint_minutes: Annotated[float, _budget(help="Save so often", example="--checkpoint_minutes 5")] = (
        5.0
    )
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
    config = hf_config(request.width, request.layers, request.vocab)
    run_ = Run(out, corpus, config, request.seed, request.batch_tokens)
    if not request.export_only:
        budget = Budget(request.minutes and request.minutes * 60, request.steps)
        run_.train(budget, peak=request.learning_rate, checkpoint_seconds=request.checkpoint_minutes * 60)
    run_.export()
    plot(out / "loss.csv", out / "loss.png")
    print(f"{out / 'hf'}: after {run_.step} steps, held-out loss {run_.held_out_loss():.3f} nats a token")
    run_.close()
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
    return Batch(tokens, weights)


# --- the run


class Budget(NamedTuple):
    """When training is over: after so many seconds, or steps; one of them is None."""

    seconds: float | None
    steps: int | None

    def done(self, seconds: float, step: int) -> float:
        """From 0 to 1."""
        return step / self.steps if self.steps is not None else seconds / (self.seconds or 1.0)


@dataclasses.dataclass
class Position:
    """Where a run is, beside its arrays: what a checkpoint's JSON holds."""

    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    tokens: int = 0


class Run:
    """A training run in a directory, resumed where its last checkpoint is."""

    def __init__(self, out: Path, corpus: Corpus, hf: dict[str, Any], seed: int, batch_tokens: int):
        """Reads the last checkpoint, if there is one.

        Raises:
          JaxchatError: the run in `out` is one of another model.
        """
        self._out, self._corpus, self._hf, self._seed, self._tokens = out, corpus, hf, seed, batch_tokens
        self.config = read_config(hf)
        self._encode = Encoder(out / "tokenizer")
        if self._encode.tokenizer.vocab_size != self.config.vocab_size:
            raise JaxchatError(f"{out}: its vocabulary is not {self.config.vocab_size}; give another --out")
        self._manager = ocp.CheckpointManager(
            (out / "checkpoints").resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )
        self._state = steps.initial_state(self.config, seed)
        self._position = Position()
        self._held_out = self._held_out_batches()
        self._restore()

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self._state.step)

    def train(self, budget: Budget, *, peak: float, checkpoint_seconds: float) -> None:
        """Trains until the budget is spent; a checkpoint is written now and then, and at the end."""
        started = time.monotonic() - self._position.seconds
        saved = time.monotonic()
        with _progress() as show, self._curve() as record:
            epoch = -1
            while (done := budget.done(self._position.seconds, self.step)) < 1:
                if epoch != self._position.epoch:
                    epoch = self._position.epoch
                    order = self._epoch(epoch)
                batch = order[self._position.batch]
                rate = steps.warmup_stable_decay(self.step, done, peak=peak, warmup=WARMUP_STEPS, decay=DECAY)
                self._state, loss = steps.train_step(
                    self.config, self._state, batch, jnp.float32(rate), dropout=DROPOUT
                )
                value = float(loss)
                if not np.isfinite(value):
                    raise JaxchatError(f"the loss is {value} at step {self.step}; lower --learning_rate")
                self._advance(len(order), int(np.count_nonzero(batch.weights)))
                self._position.seconds = time.monotonic() - started
                show(self._position, self.step, value, budget.done(self._position.seconds, self.step))
                record(self, value, rate)
                if time.monotonic() - saved > checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
        self._save()

    def close(self) -> None:
        """Ends what Orbax keeps running."""
        self._manager.close()

    def held_out_loss(self) -> float:
        """Mean loss over the held-out stories as plain text, nats a token."""
        sums = [steps.total_loss(self.config, self._state.params, batch) for batch in self._held_out]
        return float(sum(loss for loss, _ in sums) / sum(count for _, count in sums))

    def export(self) -> None:
        """Writes the model in Hugging Face's layout."""
        target = self._out / "hf"
        target.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(self._out / "tokenizer" / name, target / name)
        _write_json(target / "config.json", self._hf)
        _write_json(
            target / "generation_config.json",
            {
                "bos_token_id": 1, "eos_token_id": 2, "do_sample": True,
                "temperature": 0.5, "top_k": 40, "top_p": 0.95, "max_new_tokens": 400,
            },
        )  # fmt: skip
        tensors = {}
        for param in parameter_table(self.config):
            array = np.asarray(self._state.params[param.name])
            for layer in range(self.config.num_layers if param.per_layer else 1):
                values = array[layer] if param.per_layer else array
                tensors[_hf_name(param.hf, layer)] = np.ascontiguousarray(values)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    def _epoch(self, epoch: int) -> list[Batch]:
        rng = random.Random(f"{self._seed}/{epoch}")
        return batches(make_documents(self._corpus, rng), self._encode, self._tokens, rng)

    def _held_out_batches(self) -> list[Batch]:
        documents = [Document((), story.text) for story in self._corpus.held_out]
        return batches(documents, self._encode, self._tokens, random.Random(0))

    def _advance(self, batches_in_epoch: int, tokens: int) -> None:
        self._position.tokens += tokens
        self._position.batch += 1
        if self._position.batch == batches_in_epoch:
            self._position.epoch, self._position.batch = self._position.epoch + 1, 0

    def _save(self) -> None:
        arrays, position = ocp.args.StandardSave(self._state._asdict()), dataclasses.asdict(self._position)
        self._manager.save(
            self.step, args=ocp.args.Composite(state=arrays, position=ocp.args.JsonSave(position)), force=True
        )
        self._manager.wait_until_finished()

    def _restore(self) -> None:
        if self._manager.latest_step() is None:
            return
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._state._asdict())
        try:
            found = self._manager.restore(
                self._manager.latest_step(),
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore()
                ),
            )
        except ValueError as error:
            self.close()
            reason = " ".join(str(error).split())[:200]
            raise JaxchatError(f"{self._out}: not a checkpoint of this model ({reason})") from None
        self._state = State(**found.state)
        self._position = Position(**found.position)

    @contextlib.contextmanager
    def _curve(self) -> Iterator[Callable[["Run", float, float], None]]:
        """Appends to OUT/loss.csv every 10 steps; the held-out loss is measured every 200."""
        path = self._out / "loss.csv"
        rows = []
        if path.is_file():  # rows after the checkpoint are trained anew
            with path.open(newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= self.step]
        recent: list[float] = []
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "minutes", "tokens", "learning_rate", "loss", "held_out_loss"))
            writer.writerows(rows)

            def record(self: "Run", loss: float, rate: float) -> None:
                recent.append(loss)
                if self.step % 10 == 0:
                    held_out = f"{self.held_out_loss():.4f}" if self.step % 200 == 0 else ""
                    if held_out:
                        print(f"step {self.step}: held-out loss {held_out}", flush=True)
                    minutes = f"{self._position.seconds / 60:.2f}"
                    mean = f"{sum(recent) / len(recent):.4f}"
                    writer.writerow(
                        (self.step, minutes, self._position.tokens, f"{rate:.2e}", mean, held_out)
                    )
                    file.flush()
                    recent.clear()

            yield record


def plot(curve: Path, image: Path) -> None:
    """Draws `loss.csv`: training loss and held-out loss over tokens; nothing where there is no curve yet."""
    from matplotlib.figure import Figure

    if not curve.is_file():
        return
    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="million tokens", ylabel="nats per token")
    for column, style, label in (
        ("loss", "-", "training (dialogues, with dropout)"),
        ("held_out_loss", "o-", "held-out stories"),
    ):
        points = [(int(row["tokens"]) / 1e6, float(row[column])) for row in rows if row[column]]
        tokens, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(tokens, losses, style, label=label, markersize=3, linewidth=1)
    axes.legend()
    figure.savefig(image, dpi=90)


def _hf_name(pattern: str, layer: int) -> str:
    name = pattern.format(layer)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Position, int, float, float], None]]:
    """A bar with loss, rate and remaining time; a line every 100 steps where that is not a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.1f}%"),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip
    smooth, begun = 0.0, (time.monotonic(), 0)

    def show(position: Position, step: int, loss: float, done: float) -> None:
        nonlocal smooth, begun
        if not smooth:
            begun = time.monotonic(), position.tokens
        smooth = 0.98 * smooth + 0.02 * loss if smooth else loss
        elapsed = time.monotonic() - begun[0]
        rate = (position.tokens - begun[1]) / max(elapsed, 1e-9)
        text = f"epoch {position.epoch} step {step} loss {smooth:.3f} {rate:,.0f} tokens/s"
        bar.update(task, completed=done, description=text)
        if bar.disable and step % 100 == 0:
            left = position.seconds * (1 - done) / max(done, 1e-9) / 60
            print(f"{text} {done:.1%} {left:.0f} min left", file=sys.stderr, flush=True)

    with bar:
        task = bar.add_task("training", total=1.0)
        yield show


if __name__ == "__main__":
    exit_process(main())
