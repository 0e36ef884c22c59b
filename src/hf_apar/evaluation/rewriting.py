"""Review and rewrite: details that do not fit once all before them is in view are written again, with it in view."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from hf_apar.errors import ConfigurationError
from hf_apar.evaluation.written import Signs
from hf_apar.tree.threads import ParagraphTree, Thread

_RUN = 3  # tokens of a run that two siblings share


@dataclass(frozen=True)
class Review:
    """How a child without children of its own fits where it stands.

    Attributes:
        index: of the thread.
        alone, in_order: mean log-likelihood of its tokens, as the thread saw them, and with all that reads before in view.
        overlap: share of its runs of three tokens that an earlier sibling has too.
    """

    index: int
    alone: float
    in_order: float
    overlap: float

    @property
    def fit(self) -> float:
        """What its place makes of the detail, in nats a token, less the overlap; small where it does not fit.

        >>> Review(1, alone=-1.0, in_order=-1.5, overlap=0.25).fit
        -0.75
        """
        return self.in_order - self.alone - self.overlap


@dataclass(frozen=True)
class Rewritten:
    """An answer after its review.

    Attributes:
        tree: with the new details; the threads that were written again have a new path, and no log-likelihoods.
        reviews: of all details, in reading order.
        indices: of the threads that were written again.
        steps: forward passes that this took: one for the review, and one for each token that was written.
    """

    tree: ParagraphTree
    reviews: tuple[Review, ...]
    indices: tuple[int, ...]
    steps: int


@torch.no_grad()
def review(model: PreTrainedModel, prompt_ids: Sequence[int], tree: ParagraphTree, signs: Signs) -> list[Review]:
    """Return how each detail fits, in reading order, by one forward pass; empty details are left out.

    Raises:
        ConfigurationError: if the threads have no log-likelihoods.
    """
    ids = torch.tensor([[*prompt_ids, *tree.token_ids]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    logits[:, [signs.fork, signs.child]] = -torch.inf  # neither is written in reading order
    scores = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]  # (tokens - 1,): of the tokens from the second on
    found, place = [], len(prompt_ids) - 1
    for thread, tokens, _ in tree.segments():
        if tokens and _is_detail(tree, thread):
            if thread.logprobs is None:
                raise ConfigurationError("the threads have no log-likelihoods; call generate with output_scores=True")
            in_order = float(scores[place : place + len(tokens)].mean())
            alone = sum(thread.logprobs[: len(tokens)]) / len(tokens)
            found.append(Review(thread.index, alone, in_order, _overlap(tree, thread)))
        place += len(tokens)
    return found


def rewrite(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    tree: ParagraphTree,
    signs: Signs,
    *,
    most: int = 2,
    threshold: float = -0.5,
    max_new_tokens: int = 256,
) -> Rewritten:
    """Write the ``most`` details again that fit worst, below ``threshold``, one after the other; all else stays.

    Each is written greedily after [Fork] and [Child], which tell the model to write a detail and end, with all that reads
    before it in view. It stays as it was where nothing comes of that, or no end within ``max_new_tokens``. An answer that
    was cut by a stop string stays whole.

    Raises:
        ConfigurationError: as :func:`review`.
    """
    if tree.stopped_by is not None or len(tree.threads) == 1:
        return Rewritten(tree, (), (), 0)
    reviews = review(model, prompt_ids, tree, signs)
    worst = sorted((one for one in reviews if one.fit < threshold), key=lambda one: one.fit)[:most]
    chosen, written, steps = {one.index for one in worst}, [], 1
    for one in reviews:
        if one.index not in chosen:
            continue
        given = [*prompt_ids, *_before(tree, one.index), signs.fork, signs.child]
        new = _again(model, given, signs, max_new_tokens)
        steps += len(new)
        if len(new) > 1 and new[-1] in signs.ends:
            tree = _with_detail(tree, one.index, given, new)
            written.append(one.index)
    return Rewritten(tree, tuple(reviews), tuple(written), steps)


def _is_detail(tree: ParagraphTree, thread: Thread) -> bool:
    return thread.parent is not None and not tree.children(thread)


def _overlap(tree: ParagraphTree, thread: Thread) -> float:
    siblings = (one for one in tree.threads if one.parent == thread.parent and one.index < thread.index)
    runs, known = _runs(thread.tokens), set[tuple[int, ...]]().union(*(_runs(one.tokens) for one in siblings))
    return len(runs & known) / max(len(runs), 1)


def _runs(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[start : start + _RUN]) for start in range(len(tokens) - _RUN + 1)}


def _before(tree: ParagraphTree, index: int) -> list[int]:
    """Return all that reads before a detail."""
    before: list[int] = []
    for thread, tokens, _ in tree.segments():
        if thread.index == index:
            break
        before += tokens
    return before


def _again(model: PreTrainedModel, given: Sequence[int], signs: Signs, limit: int) -> list[int]:
    ids = torch.tensor([given], device=model.device)
    suppressed = {*(model.generation_config.suppress_tokens or ()), signs.fork, signs.child}
    generate = cast(Callable[..., Any], model.generate)
    out = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        suppress_tokens=sorted(suppressed),
    )
    return cast(list[int], out[0, len(given) :].tolist())


def _with_detail(tree: ParagraphTree, index: int, given: Sequence[int], new: Sequence[int]) -> ParagraphTree:
    *tokens, end = new
    threads = list(tree.threads)
    threads[index] = replace(
        threads[index],
        path_ids=[*given, *tokens],
        start=len(given),
        unread=[len(given) - 2, len(given) - 1],
        tokens=tokens,
        eos_token_id=end,
        finish_reason="eos",
        logprobs=None,
        scores=None,
        logits=None,
    )
    return ParagraphTree(threads, tree.stopped_by, tree.joint)
