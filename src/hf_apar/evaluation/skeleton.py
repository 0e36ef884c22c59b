"""Skeleton-of-Thought, the rival that needs no training: an outline first, then all of its points in one batch."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from hf_apar.data.records.chats import Message
from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.arm import Answerer, up_to_end
from hf_apar.evaluation.models import Loaded, padded
from hf_apar.evaluation.suites import Prompt
from hf_apar.generation_settings import eos_token_ids
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import encode_answer
from hf_apar.tree.threads import Decodes

OUTLINE = (
    "Do not answer the question below yet. Write only the outline of an answer: a numbered list of 3 to 10 points, each of "
    "3 to 5 words, one point a line.\n\nQuestion: {question}\n\nOutline:\n1."
)
POINT = (
    "Question: {question}\n\nThis is the outline of the answer:\n{outline}\n\nWrite the text of point {number} alone, in "
    "one or two sentences. Begin with: {number}. {point}:"
)
_ITEM = re.compile(r"^\s*\d+[.)]\s*(\S.*?)\s*$", re.MULTILINE)
_MOST = 10  # points
_OUTLINE = 128  # tokens of an outline: ten points have fewer


@dataclass(frozen=True)
class SkeletonArm(Answerer):
    """Skeleton-of-Thought (Ning et al., arXiv 2307.15337); the wording of both questions is our own.

    A step is a forward pass: those of the outline, and those of the longest point. Where the outline has fewer than two
    points the question is answered as it stands, and the outline's steps count too.
    """

    name: str
    says: str
    loaded: Loaded
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def together(self) -> bool:
        return False  # the points of one answer are a batch

    def in_batch(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answered]:
        """Answer a prompt; ``max_new_tokens`` bound each point."""
        (prompt,) = prompts
        before, question = prompt.messages[:-1], prompt.text
        ((outline, outline_steps, _),) = self._write(
            [[*before, _user(OUTLINE.format(question=question))]], min(max_new_tokens, _OUTLINE), "1."
        )
        points = _ITEM.findall(f"1.{outline}")[:_MOST]
        if len(points) < 2:
            written = self._write([[*prompt.messages]], max_new_tokens)
            heads = [""]
        else:
            listed = "\n".join(f"{number}. {point}" for number, point in enumerate(points, start=1))
            heads = [f"{number}. {point}:" for number, point in enumerate(points, start=1)]
            asked = [
                [*before, _user(POINT.format(question=question, outline=listed, number=number, point=point))]
                for number, point in enumerate(points, start=1)
            ]
            written = self._write(asked, max_new_tokens, *heads)
        text = "\n".join(f"{head}{one}".strip() for head, (one, _, _) in zip(heads, written, strict=True))
        tokens = encode_answer(self.loaded.tokenizer, self.loaded.encoded(prompt), text)
        steps = outline_steps + max(steps for _, steps, _ in written)
        one = Answered(
            key=prompt.key, arm=self.name, text=text, ended=all(ended for _, _, ended in written), tokens=len(tokens),
            steps=steps, critical_path=steps, peak_threads=len(written),
        )  # fmt: skip
        return [one]

    def _write(self, chats: Sequence[Sequence[Message]], limit: int, *begun: str) -> list[tuple[str, int, bool]]:
        """Return of each chat's answer the text after what it has ``begun`` with, the steps, and whether it ended."""
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        given = self.loaded.chat_template_kwargs
        rows = [encode_chat(tokenizer, [*chat], chat_template_kwargs=given) for chat in chats]
        rows = [row + encode_answer(tokenizer, row, one) for row, one in zip(rows, begun or [""] * len(rows), strict=True)]
        batch = padded(rows, model)
        generate = cast(Callable[..., Any], model.generate)
        out = generate(**batch, do_sample=False, max_new_tokens=limit, **self.options)
        ends = eos_token_ids(model.generation_config)
        found = []
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            new, ended = up_to_end(row, ends)
            text = cast(Decodes, tokenizer).decode(new, skip_special_tokens=True)
            found.append((text, len(new), ended))
        return found


def _user(content: str) -> Message:
    return {"role": "user", "content": content}
