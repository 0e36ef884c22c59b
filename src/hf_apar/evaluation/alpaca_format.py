"""Answers in the format of alpaca_eval, so that they can be judged again with the standard tool."""

import json
from collections.abc import Mapping
from pathlib import Path


def write_alpaca(path: Path, answers: Mapping[str, str], *, generator: str, dataset: str) -> None:
    """Write one arm's answers as alpaca_eval reads them: a JSON list of instruction, output, generator and dataset.

    With the files of two arms, and a judge that the tool knows::

        alpaca_eval --model_outputs apar.json --reference_outputs plain.json --fn_metric get_winrate --sort_by win_rate

    The tool pairs what has the same instruction. The metric must be named: the length-controlled one of version 0.6, its
    default, looks up how hard the 805 instructions of AlpacaEval are by their numbers, whatever stands in the file.

    Args:
        answers: by instruction.
        generator: the arm's name.
        dataset: the suite's name.
    """
    records = [
        {"instruction": instruction, "output": output, "generator": generator, "dataset": dataset}
        for instruction, output in answers.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
