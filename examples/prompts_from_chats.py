"""Prompts for `hf-apar distill` from questions and answers that you have: a list is opened where an answer was in parts.

    python examples/prompts_from_chats.py chats.jsonl prompts.jsonl

A line of chats.jsonl has `prompt` and `response`. What was answered in parts gets an opening; what was answered in a few
words, or with code, gets none, so that the model answers it whole; all else suits either way and is left out. Without
arguments it runs on three questions of its own.
"""

import json
import random
import re
import sys
from collections.abc import Iterable, Iterator

from hf_apar.data.distillation.questions import OPENINGS
from hf_apar.data.extraction.markdown import extraction

SAMPLE = (
    (
        "How do I sleep better at night?",
        "- Rest: go to bed early every night\n- Air: open the window for a while\n- Light: keep it low in the evening",
    ),
    ("What is the capital of France?", "Paris."),
    ("Tell me about the sea.", "The sea is large. " * 40),
)
FOLLOW_UP = re.compile(
    r"(thank|ok|yes|no\b|that|this|it\b|and\b|but\b|your?\b|great|can you (explain|tell me) more|those|these|now\b)", re.I
)
LENGTHS = range(20, 241)  # letters of a prompt
FEW_WORDS = 60


def prompts(chats: Iterable[tuple[str, str]], draw: random.Random) -> Iterator[dict[str, str]]:
    for prompt, response in chats:
        if len(prompt) not in LENGTHS or not prompt.isascii() or FOLLOW_UP.match(prompt):
            continue
        found = extraction(response)
        if found.tree.is_structured:
            yield {"prompt": prompt, "opening": draw.choice(OPENINGS)}
        elif len(response.split()) <= FEW_WORDS or (found.refused_by and found.refused_by.name == "code"):
            yield {"prompt": prompt}


def main() -> None:
    if len(sys.argv) == 3:
        with open(sys.argv[1], encoding="utf-8") as file:
            chats = [(record["prompt"], record["response"]) for record in map(json.loads, file)]
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in prompts(chats, random.Random(0)))
    else:
        for row in prompts(SAMPLE, random.Random(0)):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
