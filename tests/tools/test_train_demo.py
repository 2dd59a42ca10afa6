"""The model in the box: true dialogues of stories, training that can be stopped, and a model that chats."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jaxchat
import jaxchat.demo
from jaxchat.text.tokenizer_files import load_tokenizer
from tools import dialogues, stories, train_demo, write_dialogues
from tools.dialogues import Document
from tools.evaluate_demo import PROMPTS, answers_truly, mentions, unseen
from tools.stories import CASED, LOWERED, CaseRestorer, Corpus, Story, read_corpus

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--width",
    "64",
    "--layers",
    "2",
    "--vocab",
    "420",
    "--batch_tokens",
    "1024",
    "--learning_rate",
    "0.03",
]

STORY = Story(
    text="Once there was a boy named Tim. Tim had a dog. The dog found a bone.\n"
    '"Good dog!" said Tim. They played with the bone all day and were happy.',
    names=("Tim",),
    topics=("bone", "dog", "boy"),
    beings=("dog",),
)
CORPUS = Corpus((STORY,), (), (), {"bone": "a", "dog": "a", "boy": "a"})


def tiny_story(number: int, name: str = "Lily") -> str:
    animal = ("dog", "cat", "bird", "frog")[number % 4]
    thing = ("ball", "hat", "cake")[number % 3]
    return (
        f"Once upon a time, there was a girl named {name}. {name} had a {animal} and a {thing}. One day, the "
        f"{animal} took the {thing} and ran to the park number {number}. {name} was sad. \n"
        f'"Please give me the {thing}!" said {name}. The {animal} was sorry and gave the {thing} to {name}. '
        f"They played with the {thing} in the park, and the {animal} was happy. They were friends all day."
    )


@pytest.fixture(scope="module")
def tiny_corpora(tmp_path_factory) -> Path:
    """Two files laid out like the real ones: the second one begins with the first one's text, lower-cased."""
    directory = tmp_path_factory.mktemp("corpora")
    cased = [tiny_story(i) for i in range(40)]
    more = [tiny_story(i, "Anna") for i in range(40, 100)]
    (directory / CASED).write_text("\n<|endoftext|>\n".join([*cased, "Lily was cut of"]))
    lowered = "\n".join(text.replace("\n", "\n\n") for text in cased + more).lower()
    (directory / LOWERED).write_text(lowered)
    return directory


# --- stories


def test_capitals_are_restored():
    restore = CaseRestorer(
        ['One day Tom met Sue and Tom ran. "Hi!" said Tom. Then Tom saw Sue. "Go!" He ran.'] * 3
        + ["Her mom saw a bird. The bird was with Tom and I saw it."]
    )
    lowered = (
        'one day, mom saw a boy named fin. "hi, i am fin!" said fin. "i\'m here," mom said. her mom smiled.\n'
        "the next day, fin met tom. it was monday."
    )
    assert restore(lowered) == (
        'One day, Mom saw a boy named Fin. "Hi, I am Fin!" said Fin. "I\'m here," Mom said. Her mom smiled.\n'
        "The next day, Fin met Tom. It was Monday."
    )


def test_both_files_give_every_story_once_in_its_own_case(tiny_corpora):
    corpus = read_corpus(tiny_corpora)
    texts = {story.text for story in corpus.train + corpus.held_out}
    expected = {stories.clean(tiny_story(i, "Lily" if i < 40 else "Anna")) for i in range(100)}
    assert len(corpus.train) + len(corpus.held_out) == 100
    assert texts == expected


@pytest.fixture(scope="module")
def corpus(shared_data) -> Corpus:
    return read_corpus(shared_data / "corpora")


def test_the_held_out_stories_of_the_corpora_are_not_trained_on(corpus):
    train, held_out = ({s.text.lower() for s in part} for part in (corpus.train, corpus.held_out))
    assert len(held_out) > 100
    assert len(train) > 4000
    assert not train & held_out
    assert not any(text.lower() in story for text in corpus.fragments for story in held_out)


def test_every_prompt_for_several_things_of_the_evaluation_asks_for_a_new_combination(corpus):
    assert len(PROMPTS) == 50
    assert [p for p, things in PROMPTS if len(things) > 1 and not unseen(things, corpus)] == []


# --- dialogues


def test_documents_follow_from_the_seed(tiny_corpora):
    corpus = read_corpus(tiny_corpora)
    first, again, other = (dialogues.make_documents(corpus, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_story_is_asked_for_by_what_is_in_it():
    for seed in range(50):
        things, said = dialogues.asked_about(STORY, CORPUS, random.Random(seed))
        assert 1 <= len(things) <= 3
        assert all(re.search(rf"\b{thing}\b", STORY.text) and thing in said for thing in things)


def test_the_beginning_and_the_reply_of_a_continued_story_are_the_story():
    for seed in range(20):
        user, assistant = dialogues.continued(STORY, random.Random(seed)).messages[-2:]
        beginning = user["content"][user["content"].index("Once") :]
        assert (beginning + " " + assistant["content"]).split() == STORY.text.split()


def test_questions_about_a_story_are_answered_from_it():
    rng = random.Random(0)
    assert dialogues.who(STORY, rng)[1] == "Tim is in the story."
    assert dialogues.what(STORY, CORPUS, rng)[1] == "It is about Tim and a bone."
    assert dialogues.ending(STORY, rng)[1] == "They played with the bone all day and were happy."


def test_exchanged_names_leave_none_of_the_old():
    story = dialogues.renamed(STORY, random.Random(1))
    (name,) = story.names
    assert name in stories.BOYS
    assert name != "Tim"
    assert story.text == STORY.text.replace("Tim", name)


def test_roles_alternate_and_end_with_the_assistant(tiny_corpora):
    for document in dialogues.make_documents(read_corpus(tiny_corpora), random.Random(0)):
        roles = [message["role"] for message in document.messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert bool(roles) != bool(document.text)


# --- tokens and batches


@pytest.fixture(scope="module")
def encoder(tiny_corpora, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_demo.make_tokenizer(directory, read_corpus(tiny_corpora), 420)
    return train_demo.Encoder(directory)


def test_text_keeps_its_spaces_and_line_breaks(encoder):
    text = '"Hi,  dog!"\n Once upon a time; the End 7 é'
    assert encoder.tokenizer.decode(encoder.tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_assistant_counts_in_full_the_user_little_and_the_rest_not(encoder):
    messages = [
        {"role": r, "content": c} for r, c in (("system", "a"), ("user", "dog"), ("assistant", "cat"))
    ]
    ids, weights = encoder(Document(tuple(messages)))
    said = {
        weight: encoder.tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w == weight])
        for weight in sorted(set(weights))
    }
    assert said == {0.0: "<s><|system|>a</s><|user|><|assistant|>", 0.2: "dog</s>", 1.0: "cat</s>"}


def test_the_first_two_mentions_of_what_was_asked_for_count_more(encoder):
    story = {
        "role": "assistant",
        "content": "é! A cat met a dog. Dog and cat ran. The dog!",
        "asked": ("dog",),
    }
    ids, weights = encoder(Document(({"role": "user", "content": "a dog"}, story)))
    stressed = [i for i, weight in enumerate(weights) if weight == train_demo.TOPIC_WEIGHT]
    pieces = [encoder.tokenizer.token_bytes(token) for token in ids]
    assert b"".join(pieces[i] for i in stressed).replace(b" ", b"") == b"dogDog"
    assert b"".join(pieces[: stressed[0]]).decode().endswith("A cat met a")


def test_every_document_is_in_one_row_of_one_batch(encoder, tiny_corpora):
    documents = dialogues.make_documents(read_corpus(tiny_corpora), random.Random(0))
    found = train_demo.batches(documents, encoder, 1024, random.Random(0))
    rows = [(row[row > 0].tolist()) for batch in found for row in np.asarray(batch.tokens) if np.any(row > 0)]
    expected = [encoder(document)[0][: train_demo.CONTEXT] for document in documents]
    assert sorted(rows) == sorted(expected)
    assert {batch.tokens.shape[1] for batch in found} <= set(train_demo.LENGTHS)


# --- the tool, as a process


def command(*arguments: str | Path) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return [sys.executable, str(ROOT / "tools/train_demo.py"), *map(str, arguments)], environment


def train(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words, environment = command(*arguments)
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tiny_corpora, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    done = train("--data", tiny_corpora, "--out", out, "--steps", "20", *TINY)
    assert done.returncode == 0, done.stderr
    assert "after 20 steps, held-out loss" in done.stdout
    return out


def test_training_lowers_the_loss(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert losses[0] < 7
    assert losses[1] < losses[0] - 0.5


@pytest.mark.full
def test_a_killed_run_goes_on_as_if_nothing_had_happened(trained, tiny_corpora, tmp_path):
    arguments = ["--data", tiny_corpora, "--out", tmp_path, "--steps", "20", *TINY]
    words, environment = command(*arguments, "--checkpoint_steps", "1")
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finished = lambda: [int(p.name) for p in (tmp_path / "checkpoints").glob("*") if p.name.isdigit()]  # noqa: E731
    deadline = time.monotonic() + 240
    while max(finished(), default=0) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= max(finished()) < 20
    done = train(*arguments)
    assert done.returncode == 0, done.stderr
    for name in ("hf/model.safetensors", "hf/tokenizer.model", "hf/config.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes(), name


def test_the_result_is_a_model_directory_that_chats(trained):
    model = jaxchat.load(trained / "hf")
    chat = model.chat_session(system="You are a friendly story-teller.")
    stream = chat.send("Tell me a story about a dog.", max_new_tokens=12)
    assert "".join(stream) == stream.result.text
    assert len(stream.result.token_ids) > 2
    assert load_tokenizer(trained / "hf").vocab_size == model.config.vocab_size == 420
    assert json.loads((trained / "hf/generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parity
def test_transformers_reads_the_result_alike(trained):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(trained / "hf")
    encoder = train_demo.Encoder(trained / "hf")
    messages = ({"role": "user", "content": 'A  "dog",\nplease'}, {"role": "assistant", "content": "Once"})
    ids, _ = encoder(Document(messages))
    assert tokenizer.apply_chat_template(messages, return_dict=False) == ids
    model = jaxchat.load(trained / "hf")
    with torch.no_grad():
        expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0], -1)
    chosen = expected[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    np.testing.assert_allclose(model.score(token_ids=[ids])[0].logprobs, chosen, atol=1e-4)


def test_a_run_of_another_size_is_refused(trained, tiny_corpora, capsys):
    other = ["--width", "128", *TINY[2:]]
    arguments = ["--data", tiny_corpora, "--out", trained, "--steps", "21", *other]
    assert train_demo.main(["train_demo.py", *map(str, arguments)]) == 2
    assert "model was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--out", "x", "--steps", "1"], "--data must be given"),
        (["--data", ".", "--out", "x"], "give either --minutes or --steps"),
        (["--data", "nowhere", "--out", "x", "--steps", "1"], "--data is the folder of"),
    ],
)
def test_wrong_usage_is_one_line(arguments, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_demo.main(["train_demo.py", *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- the evaluation


def test_a_thing_is_mentioned_in_the_plural_too_but_not_inside_another_word():
    assert mentions("Two Cats and a fairy's mice.", "cat")
    assert mentions("Two fairies and mice.", "fairy")
    assert mentions("Two fairies and mice.", "mouse")
    assert not mentions("A caterpillar is in the bobcat.", "cat")


@pytest.mark.parametrize(
    ("answer", "true"),
    [
        ("Tim and Sue are in the story.", True),
        ("A dog and Tim are in the story.", True),
        ("Tim and Max are in the story.", False),
        ("A cat is in the story.", False),
        ("They are in it.", False),
    ],
)
def test_an_answer_is_true_if_all_it_names_are_in_the_story(answer, true):
    assert answers_truly(answer, "Tim had a dog. Sue had none.") is true


# --- the model in the box


def test_the_model_in_the_box_is_small_and_complete():
    files = {path.name: path for path in jaxchat.demo.path().rglob("*") if path.is_file()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "MODEL_CARD.md",
        "loss.png",
    } <= files.keys()
    assert {"CARD.md", "chimera_config.json", "chimera.safetensors"} <= files.keys()
    assert sum(path.stat().st_size for path in files.values()) <= 6_500_000
    assert files["chimera.safetensors"].stat().st_size < 3_000_000
    assert b"/tmp" not in files["tokenizer.model"].read_bytes()


def test_the_model_in_the_box_greets_and_tells_what_it_is_asked_for():
    model = jaxchat.load(jaxchat.demo.path())
    chat = model.chat_session()
    assert "".join(chat.send("Hello!", max_new_tokens=40)).startswith(("Hello", "Hi"))
    story = "".join(chat.send("Tell me a story about a dog.", max_new_tokens=300))
    assert "dog" in story
    assert len(story.split()) > 40


def test_an_installation_without_the_model_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(jaxchat.demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(jaxchat.JaxchatError, match="missing from this installation"):
        jaxchat.demo.path()


def test_conversations_are_written_for_training(tiny_corpora, tmp_path, capsys):
    counts = []
    for name, more in (("train", ["--epochs", "2"]), ("held_out", ["--held_out"])):
        arguments = ["--data", str(tiny_corpora), "--out", str(tmp_path / f"{name}.jsonl"), *more]
        assert write_dialogues.main(["write_dialogues.py", *arguments]) == 0
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        counts.append(len(lines))
        for line in lines:
            record = json.loads(line)
            assert record.keys() in ({"text"}, {"messages"})
            assert all(message.keys() == {"role", "content"} for message in record.get("messages", ()))
    assert counts[0] > 2 * counts[1] > 0
