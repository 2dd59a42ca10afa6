"""MMLU (Hendrycks et al. 2020), all of it and by subject, worded as by lm-evaluation-harness 0.4.13."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxchat.evaluation.rows import Row
from jaxchat.evaluation.tasks.choices import choice
from jaxchat.evaluation.tasks.task import Example, Task

SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine",
    "college_physics", "computer_security", "conceptual_physics", "econometrics", "electrical_engineering",
    "elementary_mathematics", "formal_logic", "global_facts", "high_school_biology",
    "high_school_chemistry", "high_school_computer_science", "high_school_european_history",
    "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
    "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history",
    "high_school_world_history", "human_aging", "human_sexuality", "international_law", "jurisprudence",
    "logical_fallacies", "machine_learning", "management", "marketing", "medical_genetics",
    "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition", "philosophy", "prehistory",
    "professional_accounting", "professional_law", "professional_medicine", "professional_psychology",
    "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)  # fmt: skip
_LETTERS = "ABCD"


@dataclass
class _Row:
    question: str
    subject: str
    choices: list[str]
    answer: int


def _read(rows: Sequence[Row]) -> list[Example]:
    return [_example(row) for row in rows]


def _example(row: Row) -> Example:
    own = row.read(_Row)
    if len(own.choices) != len(_LETTERS):
        raise row.wrong(f"has {len(own.choices)} choices; expected {len(_LETTERS)}")
    listed = "".join(f"\n{letter}. {text}" for letter, text in zip(_LETTERS, own.choices, strict=True))
    subject = own.subject.replace("_", " ")
    return choice(
        row,
        question=f"{own.question.strip()}{listed}\nAnswer:",
        choices=tuple(_LETTERS),
        label=own.answer,
        id=f"{own.subject}/{row.number}",
        group=own.subject,
        about=f"The following are multiple choice questions (with answers) about {subject}.\n\n",
    )


def _files(subject: str, *splits: str) -> tuple[str, ...]:
    return tuple(f"*mmlu*/{subject}/{split}{kind}" for split in splits for kind in ("/*.arrow", "-*.parquet"))


def _task(name: str, about: str, subject: str) -> Task:
    return Task(
        name=name,
        about=f"MMLU: {about}, the likeliest of four letters",
        read=_read,
        metric="acc",
        files=_files(subject, "test", "validation"),
        shots=_files(subject, "dev"),
        in_order=True,
        folders=True,
    )


TASKS = (
    _task("mmlu", "questions of 57 subjects", "*"),
    *(_task(f"mmlu_{subject}", f"questions of {subject.replace('_', ' ')}", subject) for subject in SUBJECTS),
)
