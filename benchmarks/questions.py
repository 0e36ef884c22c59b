"""Questions: the package's own, or a bench's in FastChat's form (``vicuna_bench/question.jsonl``), which is no part of it."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hf_apar.evaluation.suites import own

OWN = ("parts", "whole", "either")


class Question(NamedTuple):
    key: str
    category: str
    text: str  # the first turn


def add_questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--questions", type=Path, help="JSON Lines with category and turns, as FastChat's Vicuna Bench; by default our own"
    )


def asked(path: Path | None) -> tuple[str, list[Question]]:
    """What the questions are called, and all of them: those of ``path``, or the package's own, by suite."""
    if path is not None:
        return path.parent.name if path.stem == "question" else path.stem, read(path)
    return "our own suites", [Question(one.key, one.suite, one.text) for one in own(*OWN) if len(one.messages) == 1]


def read(path: Path) -> list[Question]:
    """The questions of ``path``, or the end of the program with a line that says what is wrong."""
    if not path.is_file():
        sys.exit(f"{path} is missing: name FastChat's vicuna_bench/question.jsonl, JSON Lines with `category` and `turns`")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                record = json.loads(line)
                text = record["turns"][0]
                found.append(Question(str(record.get("question_id", text)), record["category"], text))
            except (ValueError, LookupError, TypeError) as error:
                sys.exit(f"{path}, line {number}: {error!r}; wanted `category` and `turns`")
    return found


def evenly(questions: Sequence[Question], number: int) -> Sequence[Question]:
    """``number`` of the questions, with equal steps between them; all, if there are not so many."""
    return questions[:: max(len(questions) // number, 1)][:number]


def by_category(questions: Sequence[Question], each: int | None = None) -> list[Question]:
    """The first ``each`` questions of every category, or all of them, category after category."""
    return [question for group in _groups(questions) for question in group[:each]]


def in_turn(questions: Sequence[Question], each: int) -> list[Question]:
    """The first ``each`` questions of every category, the categories in turn."""
    groups = _groups(questions)
    return [group[number] for number in range(each) for group in groups if number < len(group)]


def _groups(questions: Sequence[Question]) -> list[list[Question]]:
    groups = defaultdict(list)
    for question in questions:
        groups[question.category].append(question)
    return list(groups.values())
