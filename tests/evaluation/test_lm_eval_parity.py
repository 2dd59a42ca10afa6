"""lm-evaluation-harness over this library against its own `hf` model, on tasks of every kind."""

import json
import logging
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.support.tiny_chat import write_tiny_chat

pytestmark = pytest.mark.parity

WORDS = [
    "fox",
    "bear",
    "owl",
    "tree",
    "river",
    "stone",
    "cloud",
    "song",
    "night",
    "lamp",
    "road",
    "hill",
    "bird",
    "fish",
    "moon",
    "star",
]
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": 2,
    },
    "local_uncond": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} ",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}],
    },
    "local_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_reply": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["zz", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks and their rows; some texts are longer than the context."""
    import yaml

    folder = tmp_path_factory.mktemp("tasks")
    random = np.random.default_rng(0)

    def words(count):
        return " ".join(random.choice(WORDS, count))

    rows = [
        {
            "question": words(3),
            "choices": [words(int(n)) for n in random.integers(1, 4, 3)],
            "answer": int(random.integers(3)),
            "text": words(40 if number == 3 else 8),
        }
        for number in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        own = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            "test_split": "test",
            "fewshot_split": "test",
            **task,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def directory(request, tmp_path_factory):
    sizes = {"max_position_embeddings": 160} if request.param != "gpt2" else {"n_positions": 160}
    folder = write_tiny_chat(tmp_path_factory.mktemp(request.param), model_type=request.param, **sizes)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def scores(model, tasks, *, chat=False):
    """Metric -> value of every task, and the replies."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = [name for name in TASKS if not (chat and name == "local_text")]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        model=model, tasks=names, task_manager=manager, apply_chat_template=chat, bootstrap_iters=0,
        random_seed=0, numpy_random_seed=0, fewshot_random_seed=0, log_samples=True,
    )  # fmt: skip
    values = {
        (task, metric): value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric
    }
    answers = {
        task: [[_plain(one) for one in sample["filtered_resps"]] for sample in sorted(samples, key=_doc)]
        for task, samples in found["samples"].items()
    }
    return values, answers


def _doc(sample):
    return sample["doc_id"]


def _plain(answer):
    return list(answer) if isinstance(answer, tuple | list) else answer


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@pytest.mark.parametrize("chat", [False, True])
def test_every_kind_of_task_scores_as_with_the_reference(directory, tasks, chat):
    from lm_eval.models.huggingface import HFLM

    from jaxchat.evaluation.lm_eval import JaxchatLM

    ours, our_answers = scores(JaxchatLM(str(directory), batch_size=3), tasks, chat=chat)
    reference = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=3)
    theirs, their_answers = scores(reference, tasks, chat=chat)
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 6
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    for task, answers in their_answers.items():
        for own, other in zip(our_answers[task], answers, strict=True):
            _same_answers(own, other)


def _same_answers(own, other):
    """Log-likelihoods to 1e-4 of a nat a token or so, whether they are greedy, and texts."""
    for one, reference in zip(own, other, strict=True):
        if isinstance(reference, list):
            assert one[1] == reference[1]
            assert one[0] == pytest.approx(reference[0], abs=2e-3, rel=1e-4)
        elif isinstance(reference, float):
            assert one == pytest.approx(reference, abs=2e-3, rel=1e-4)
        else:
            assert one == reference


def test_a_layer_plan_changes_the_scores_and_the_whole_model_does_not(directory, tasks):
    from jaxchat.evaluation.lm_eval import JaxchatLM

    whole, _ = scores(JaxchatLM(str(directory)), tasks)
    same, _ = scores(JaxchatLM(str(directory), "0;1:"), tasks)
    other, _ = scores(JaxchatLM(str(directory), "0;0:"), tasks)
    key = "local_text", "bits_per_byte,none"
    assert whole == pytest.approx(same)
    assert not math.isclose(whole[key], other[key], rel_tol=1e-6)


def test_the_command_of_lm_eval_knows_the_model(directory, tasks, tmp_path):
    command = [
        sys.executable, "-m", "jaxchat.evaluation.lm_eval", "run", "--model", "jaxchat",
        "--model_args", f"pretrained={directory},layer_spec=0;0:", "--tasks", "local_choice",
        "--include_path", str(tasks), "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "local_choice" in done.stdout
    assert "acc_norm" in done.stdout


def test_what_has_no_counterpart_is_refused_by_name(directory):
    from jaxchat.errors import UsageError
    from jaxchat.evaluation.lm_eval import JaxchatLM

    with pytest.raises(UsageError, match="unknown model argument 'parallelize'"):
        JaxchatLM(str(directory), parallelize=True)
    lm = JaxchatLM(str(directory))
    with pytest.raises(UsageError, match="the task sets num_beams"):
        lm._options({"until": [], "num_beams": 4})
