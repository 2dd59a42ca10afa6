"""GSM8K (Cobbe et al. 2021): sums of grade school in words, as by lm-evaluation-harness 0.4.13."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxchat.evaluation.checks import GradeSchoolMath
from jaxchat.evaluation.items import Generation
from jaxchat.evaluation.rows import Row
from jaxchat.evaluation.tasks.task import Example, Frame, Task

STOP = ("Question:", "</s>", "<|im_end|>")


@dataclass
class _Row:
    question: str
    answer: str


def _read(rows: Sequence[Row]) -> list[Example]:
    return [_example(row) for row in rows]


def _example(row: Row) -> Example:
    own = row.read(_Row)
    if "####" not in own.answer:
        raise row.wrong("answer has no '#### NUMBER' at its end; expected a solution of GSM8K")
    question = f"Question: {own.question}\nAnswer:"

    def ask(frame: Frame) -> Generation:
        return Generation(row.name, frame(question), GradeSchoolMath(own.answer), stop=STOP)

    return Example(id=row.name, place=row.place, ask=ask, question=question, answer=f" {own.answer}")


TASKS = (
    Task(
        name="gsm8k",
        about="GSM8K: sums of grade school in words, the number of the reply",
        read=_read,
        metric="flexible",
        files=("*/gsm8k/test.jsonl*", "*/gsm8k/*test*.parquet", "*/gsm8k/test/*.arrow"),
        shots=("*/gsm8k/train.jsonl*", "*/gsm8k/*train*.parquet", "*/gsm8k/train/*.arrow"),
        few_shot=5,
    ),
)
