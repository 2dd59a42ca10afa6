"""Tasks: what is read of files, how questions are worded, and what is refused before a model is loaded."""

import gzip
import json
import sys

import pytest

from jaxchat.errors import JaxchatError
from jaxchat.evaluation.items import Choice, Completion, Document, Generation, Turn, digest
from jaxchat.evaluation.rows import read_rows
from jaxchat.evaluation.tasks import TASKS, names, prepare
from jaxchat.evaluation.tasks.mmlu import SUBJECTS
from jaxchat.evaluation.tasks.own import blocks

ARC = [
    {
        "id": f"q{number}",
        "question": f"What is {number}?",
        "choices": {"text": [f"it is {number}", "none"], "label": ["A", "B"]},
        "answerKey": "AB"[number % 2],
    }
    for number in range(6)
]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def one(task, **options):
    (prepared,) = prepare(task, **options)
    return prepared


def pyarrow():
    return pytest.importorskip("pyarrow")


# --- wording, as lm-evaluation-harness 0.4.13 has it


def test_arc_is_a_question_and_its_choices(tmp_path):
    write_lines(tmp_path / "ARC-Easy" / "test.jsonl", ARC)
    task = one("arc_easy", data=tmp_path)
    assert [item.id for item in task.items] == [f"q{number}" for number in range(6)]
    first = task.items[1]
    assert isinstance(first, Choice)
    assert [tuple(request) for request in first.requests] == [
        ("Question: What is 1?\nAnswer:", " it is 1"),
        ("Question: What is 1?\nAnswer:", " none"),
    ]
    assert first.label == 1
    assert one("arc_easy", data=tmp_path, limit=2).total == 6


def test_lambada_asks_for_the_last_word(tmp_path):
    write_lines(tmp_path / "lambada_test.jsonl", [{"text": "one two, three"}])
    (item,) = one("lambada", data=tmp_path).items
    assert item == Completion("0", ("one two,", " three"))


def test_piqa_takes_its_labels_from_the_file_beside(tmp_path):
    rows = [{"goal": "g", "sol1": "a", "sol2": "b"}] * 2
    write_lines(tmp_path / "piqa" / "valid.jsonl", rows)
    labels = tmp_path / "piqa" / "valid-labels.lst"
    labels.write_text("1\n0\n")
    task = one("piqa", data=tmp_path)
    assert [item.label for item in task.items] == [1, 0]
    assert task.items[0].requests[0] == ("Question: g\nAnswer:", " a")
    labels.write_text("1\n")
    with pytest.raises(JaxchatError, match=r"valid-labels.lst: has 1 labels; expected 2"):
        one("piqa", data=tmp_path)
    labels.unlink()
    with pytest.raises(JaxchatError, match=r"valid.jsonl:1: has no label, and there is no valid-labels.lst"):
        one("piqa", data=tmp_path)


def test_mmlu_shows_the_first_examples_of_its_subject(tmp_path):
    arrow = pyarrow()
    for subject in ("anatomy", "virology"):
        for split, count in (("dev", 3), ("validation", 2)):
            rows = [
                {
                    "question": f" {subject} {split} {n}",
                    "subject": subject,
                    "choices": list("wxyz"),
                    "answer": n,
                }
                for n in range(count)
            ]
            folder = tmp_path / "mmlu" / subject / split
            folder.mkdir(parents=True)
            table = arrow.Table.from_pylist(rows)
            with arrow.ipc.new_stream(str(folder / "data.arrow"), table.schema) as writer:
                writer.write_table(table)
    task = one("mmlu", data=tmp_path, few_shot=2)
    assert [item.id for item in task.items] == [f"{s}/{n}" for s in ("anatomy", "virology") for n in (0, 1)]
    assert {item.group for item in task.items} == {"anatomy", "virology"}
    letters = "A. w\nB. x\nC. y\nD. z\nAnswer:"
    assert task.items[2].requests[0] == (
        "The following are multiple choice questions (with answers) about virology.\n\n"
        f"virology dev 0\n{letters} A\n\nvirology dev 1\n{letters} B\n\nvirology validation 0\n{letters}",
        " A",
    )
    assert len(one("mmlu", data=tmp_path, limit=1).items) == 2
    assert [item.id for item in one("mmlu_virology", data=tmp_path).items] == ["virology/0", "virology/1"]
    assert len(SUBJECTS) == len(set(SUBJECTS)) == 57


def test_gsm8k_has_five_examples_of_its_training_questions(tmp_path):
    rows = [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(8)]
    write_lines(tmp_path / "gsm8k" / "test.jsonl", rows[:2])
    write_lines(tmp_path / "gsm8k" / "train.jsonl", rows[2:])
    task = one("gsm8k", data=tmp_path)
    item = task.items[0]
    assert isinstance(item, Generation)
    assert task.few_shot == 5
    assert item.prompt.count("Question: ") == 6
    assert item.prompt.endswith("\n\nQuestion: q0\nAnswer:")
    assert "q1" not in item.prompt
    assert item.stop == ("Question:", "</s>", "<|im_end|>")


def test_examples_are_drawn_with_the_seed_and_are_never_the_question(tmp_path):
    write_lines(tmp_path / "ARC-Easy" / "test.jsonl", ARC)
    contexts = [item.requests[0].context for item in one("arc_easy", data=tmp_path, few_shot=4, seed=1).items]
    for number, context in enumerate(contexts):
        assert context.count(f"What is {number}?") == 1
        assert context.count("Question: ") == 5
    again = one("arc_easy", data=tmp_path, few_shot=4, seed=1, limit=2)
    assert [item.requests[0].context for item in again.items] == contexts[:2]
    others = one("arc_easy", data=tmp_path, few_shot=4, seed=2)
    assert [item.requests[0].context for item in others.items] != contexts
    with pytest.raises(JaxchatError, match="few_shot is 6, but arc_easy has 6 rows"):
        one("arc_easy", data=tmp_path, few_shot=6)


def test_in_a_chat_examples_are_turns(tmp_path):
    write_lines(tmp_path / "gsm8k" / "test.jsonl", [{"question": f"q{n}", "answer": "#### 1"} for n in "ab"])
    task = one("gsm8k", data=tmp_path, few_shot=1, chat=True, has_template=True)
    assert task.items[0].prompt == (
        Turn("user", "Question: qb\nAnswer:"),
        Turn("assistant", "#### 1"),
        Turn("user", "Question: qa\nAnswer:"),
    )
    assert task.chat


@pytest.mark.parametrize("folder", ["arc_easy/rc_0shot", "winogrande/rc_0shot", "gsm8k/gold_bpb_5shot"])
def test_requests_of_olmo_are_grouped_by_document(shared_data, folder):
    path = shared_data / "evals" / "olmo_oe_eval" / folder
    task = one(f"olmo:{folder}", data=shared_data / "evals", limit=3)
    lines = list(map(json.loads, gzip.decompress((path / "requests.jsonl.gz").read_bytes()).splitlines()))
    config = json.loads((path / "config.json").read_text())
    assert task.total == config["num_instances"]
    metrics = {"acc_raw": "acc", "logits_per_byte": "bits_per_byte_mean"}
    assert task.metric == metrics[config["task_config"]["primary_metric"]]
    requests = [
        r for item in task.items for r in (item.requests if isinstance(item, Choice) else [item.request])
    ]
    first = [(line["request"]["context"], line["request"]["continuation"]) for line in lines]
    assert [tuple(request) for request in requests] == first[: len(requests)]
    if folder.startswith("arc"):
        item = task.items[0]
        assert {request.context for request in item.unconditional} == {"Answer:"}
        assert [r.continuation for r in item.unconditional] == [r.continuation for r in item.requests]
        assert item.label == lines[0]["label"]


@pytest.mark.full
def test_every_folder_of_olmo_and_every_name_is_read(shared_data):
    evals = shared_data / "evals"
    folders = [path.parent for path in evals.glob("olmo_oe_eval/*/*/config.json")]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        task = one(f"olmo:{folder.parent.name}/{folder.name}", data=evals)
        assert len(task.items) == config["num_instances"]
    sizes = {"arc_easy": 570, "arc_challenge": 299, "piqa": 1838, "lambada": 5153, "gsm8k": 1319}
    sizes |= {"mmlu": 1531, "ifeval": 541, "rys_math": 120, "rys_math_16": 16, "rys_eq": 139}
    for name in TASKS:
        task = one(name, data=evals)
        assert len(task.items) == sizes.get(name, len(task.items)) > 0


# --- files of one's own


def test_own_questions_name_the_answer_as_people_do(tmp_path):
    rows = [
        {"question": "q", "choices": ["x", "y"], "answer": answer, "id": name}
        for name, answer in (("number", 1), ("letter", "B"), ("text", "y"))
    ]
    for name in ("a.jsonl", "a.jsonl.gz"):
        task = one(f"choice:{write_lines(tmp_path / name, rows)}")
        assert [item.label for item in task.items] == [1, 1, 1]
        assert [item.id for item in task.items] == ["number", "letter", "text"]
        assert task.items[0].requests == (("q", " x"), ("q", " y"))


def test_files_of_every_kind_have_the_same_rows(tmp_path):
    arrow = pyarrow()
    from pyarrow import parquet

    rows = [{"context": "a", "continuation": " b, c"}, {"context": "d", "continuation": "\ne"}]
    table = arrow.Table.from_pylist(rows)
    with arrow.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as writer:
        writer.write_table(table)
    with arrow.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table)
    parquet.write_table(table, tmp_path / "a.parquet")
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"0": rows[0], "1": rows[1]}))
    (tmp_path / "a.csv").write_text('context,continuation\na," b, c"\nd,"\ne"\n')
    for path in sorted(tmp_path.iterdir()):
        task = one(f"completion:{path}")
        assert [tuple(item.request) for item in task.items] == [("a", " b, c"), ("d", "\ne")], path
        assert [item.id for item in task.items] == ["0", "1"]


def test_a_match_has_answers_or_a_pattern(tmp_path):
    rows = [
        {"prompt": "p", "answer": 4},
        {"prompt": "p", "answer": ["a", "b"]},
        {"prompt": "p", "regex": "x+"},
    ]
    task = one(f"match:{write_lines(tmp_path / 'm.jsonl', rows)}", max_new_tokens=9)
    assert [item.check.answers for item in task.items] == [("4",), ("a", "b"), ()]
    assert task.items[0].max_new_tokens == 9


def test_a_text_file_is_scored_in_blocks_that_are_all_of_it(tmp_path):
    text = "\n\n".join(f"Paragraph {n} has " + "some words and " * 60 + "an end." for n in range(12))
    (tmp_path / "a.txt").write_text(text)
    items = one(f"text:{tmp_path / 'a.txt'}").items
    assert all(isinstance(item, Document) for item in items)
    assert "".join(item.text for item in items) == text
    assert all(len(item.text) <= 2000 for item in items)
    assert [item.before + item.text for item in items] == [text[: item.end] for item in items]
    assert not any(item.before[-1:].isspace() for item in items)
    assert blocks("x" * 4500) == [(0, 2000), (2000, 4000), (4000, 4500)]
    assert one(f"text:{write_lines(tmp_path / 'a.jsonl', [{'text': text}])}").items[0].text == text


def test_what_an_item_asks_is_in_its_digest(tmp_path):
    row = {"question": "q", "choices": ["x", "y"], "answer": 0}
    one_way = one(f"choice:{write_lines(tmp_path / 'a.jsonl', [row])}").items[0]
    other = one(f"choice:{write_lines(tmp_path / 'b.jsonl', [{**row, 'question': 'Q'}])}").items[0]
    assert digest(one_way) != digest(other)
    (tmp_path / "a.txt").write_text("some words " * 300)
    texts = one(f"text:{tmp_path / 'a.txt'}").items
    assert len({digest(item) for item in texts}) == len(texts)


# --- refusals

GOOD = {"question": "q", "choices": ["x", "y"], "answer": 0}
BROKEN = {
    "a missing column": ([GOOD, {"question": "q", "choices": ["x"]}], r"f.jsonl:2: 'answer' is missing;"),
    "a column of another type": ([{**GOOD, "choices": "xy"}], r"f.jsonl:1: choices is 'xy'; expected a list"),
    "a label out of range": ([{**GOOD, "answer": 2}], r"f.jsonl:1: the answer is 2; expected 0 to 1"),
    "a label of no choice": ([{**GOOD, "answer": "C"}], r"f.jsonl:1: the answer is 'C'; expected the number"),
    "one choice": ([{**GOOD, "choices": ["x"]}], r"has 1 choices; expected at least two"),
    "an empty choice": ([{**GOOD, "choices": ["x", " "]}], r"a choice is empty"),
    "an id twice": ([{**GOOD, "id": 7}, {**GOOD, "id": "7"}], r"f.jsonl:2: the id '7' .*f.jsonl:1"),
    "a row that is no object": ([[1]], r"f.jsonl:1: is \[1\]; expected an object"),
    "no rows": ([], r"f.jsonl: no rows in it"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_named(tmp_path, case):
    rows, message = BROKEN[case]
    with pytest.raises(JaxchatError, match=message):
        prepare(f"choice:{write_lines(tmp_path / 'f.jsonl', rows)}")


FILES = {
    "cut.jsonl.gz": (gzip.compress(b"{}" * 99)[:-9], "not readable as gzip"),
    "no.jsonl": (b'{"text": "a"', r":1: not readable as JSON"),
    "deep.json": (b"[" * 10**5, "nested more than"),
    "latin.txt": (b"caf\xe9", "not UTF-8 text: byte 0xe9"),
    "number.json": (b"7", "is 7; expected a list of objects"),
    "no.arrow": (b"nothing", "not readable as Arrow or Parquet"),
    "cut.parquet": (b"PAR1" + bytes(50) + b"PAR1", "not readable as Arrow or Parquet"),
    "short.csv": (b"context,continuation\na\n", r"short.csv:2: has not the 2 columns"),
    "a.docx": (b"x", "no kind of file that is known; expected one of .jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named(tmp_path, name):
    data, message = FILES[name]
    if name.endswith(("arrow", "parquet")):
        pyarrow()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(JaxchatError, match=message) as error:
        prepare(f"completion:{tmp_path / name}")
    assert name in str(error.value)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxchat.evaluation.rows.MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(bytes(1 << 22)))
    with pytest.raises(JaxchatError, match=r"bomb.jsonl.gz: more than 1 MiB"):
        read_rows(tmp_path / "bomb.jsonl.gz")
    arrow = pyarrow()
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist([{"text": "x" * (1 << 21)}]), tmp_path / "bomb.parquet")
    with pytest.raises(JaxchatError, match=r"bomb.parquet: more than 1 MiB"):
        read_rows(tmp_path / "bomb.parquet")


def test_arrow_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.arrow").write_bytes(b"x")
    with pytest.raises(JaxchatError, match=r"a.arrow: needs pyarrow.*jaxchat\[eval\]"):
        prepare(f"text:{tmp_path / 'a.arrow'}")


WRONG = {
    "arc_eas": "no task 'arc_eas'; did you mean arc_easy",
    "zzz": "no task 'zzz'; there are arc_easy,",
    "": "tasks is empty",
    "arc_easy": "arc_easy: no data; say where its files are with data='DIR'",
    "olmo:a/b": "olmo:a/b: no data",
    "choice:": "choice: names no file",
    "choice:none.jsonl": "none.jsonl: no such file",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_task_that_is_not_there_is_refused(name):
    with pytest.raises(JaxchatError, match=WRONG[name]):
        prepare(name)


def test_what_does_not_go_together_is_refused(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text")
    with pytest.raises(JaxchatError, match=r"few_shot is 1, but text:.* has no examples"):
        prepare(f"text:{text}", few_shot=1)
    with pytest.raises(JaxchatError, match="is text that is read as it is; leave apply_chat_template out"):
        prepare(f"text:{text}", chat=True, has_template=True)
    rows = write_lines(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(JaxchatError, match="the model has no chat template"):
        prepare(f"choice:{rows}", chat=True)
    with pytest.raises(JaxchatError, match="is there twice"):
        prepare([f"choice:{rows}", f"choice:{rows}"])
    with pytest.raises(JaxchatError, match="no such directory"):
        prepare("piqa", data=tmp_path / "none")
    with pytest.raises(
        JaxchatError, match=r"piqa: no file of it in .*; expected one such as piqa/valid.jsonl"
    ):
        prepare("piqa", data=tmp_path)
    for folder in ("a", "b"):
        write_lines(tmp_path / folder / "piqa" / "valid.jsonl", [{}])
    with pytest.raises(JaxchatError, match="files of it in several folders"):
        prepare("piqa", data=tmp_path)
    with pytest.raises(JaxchatError, match=r"0 files requests.jsonl and 0 config.json.*there are none"):
        prepare("olmo:a/b", data=tmp_path)


def test_instructions_that_are_not_known_are_refused(tmp_path):
    row = {
        "key": 1,
        "prompt": "p",
        "instruction_id_list": ["keywords:existence"],
        "kwargs": [{"keywords": ["a"]}],
    }
    path = tmp_path / "ifeval" / "input.jsonl"
    write_lines(path, [row])
    assert len(one("ifeval", data=tmp_path).items) == 1
    for change, message in (
        ({"instruction_id_list": ["keywords:x"]}, "no instruction 'keywords:x'"),
        ({"kwargs": [{"keywords": None}]}, "keywords of keywords:existence is missing"),
        ({"kwargs": [{"keywords": [""]}]}, r"kwargs.keywords\[0\] is ''"),
        ({"kwargs": []}, "has 1 instructions and 0 kwargs"),
    ):
        write_lines(path, [{**row, **change}])
        with pytest.raises(JaxchatError, match=message):
            one("ifeval", data=tmp_path)


def test_rows_of_several_files_are_numbered_on(tmp_path):
    for number in range(2):
        write_lines(
            tmp_path / "lambada" / f"test-{number}.jsonl", [{"text": f"one {number}"}, {"text": "a b"}]
        )
    items = one("lambada", data=tmp_path).items
    assert [(item.id, item.request.continuation) for item in items] == [
        ("0", " 0"), ("1", " b"), ("2", " 1"), ("3", " b"),
    ]  # fmt: skip


def test_own_files_are_found_in_the_data_too(tmp_path):
    write_lines(tmp_path / "deep" / "a.jsonl", [GOOD])
    assert len(one("choice:deep/a.jsonl", data=tmp_path).items) == 1


def test_names_of_tasks_may_be_those_of_files_with_commas(tmp_path):
    path = tmp_path / "a,b.txt"
    path.write_text("x")
    assert names(f"text:{path}") == [f"text:{path}"]
    assert names("piqa, lambada,") == ["piqa", "lambada"]
