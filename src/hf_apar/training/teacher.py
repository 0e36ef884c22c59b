"""The model before its tuning as a teacher of words: what it would say next, had it written the whole answer in order.

A thread sees its path alone, while the answer is read from its first word to its last, and a reader judges a detail after
all details before it. The teacher does too: its distribution at a text token, given the text before it as it reads, is what
the thread learns to come close to (knowledge distillation, Hinton et al., 2015). A sampled token says less: the base finds
many others as good. Of structure it knows nothing: left to itself it would write no list, and after a detail's sentence it
would begin the next item. So the main thread, and the ends of threads and lines, are learnt from the training text alone.
Where a tokenizer joins a full stop and a line's end in one token, the teacher can give such a token's share to nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor
from torch.nn.functional import kl_div

from hf_apar.data.features import IGNORED
from hf_apar.errors import ConfigurationError
from hf_apar.masks import additive


@dataclass(frozen=True)
class Reading:
    """A batch of trees as it reads, for a model that knows no control tokens.

    Attributes:
        attention_mask: (batch, 1, length, length), additive; a token sees all text of its tree before it.
        position_ids: (batch, length); control tokens do not count.
        rows, places: (targets,), where in the batch a forked thread's target is text that stays in its line.
        told_at: (targets,), the place in the same row whose token comes before that target as the answer reads.
    """

    attention_mask: Tensor
    position_ids: LongTensor
    rows: LongTensor
    places: LongTensor
    told_at: LongTensor


def reading(batch: Mapping[str, Tensor], control_ids: tuple[int, int], structural_ids: Tensor) -> Reading:
    """Return how a batch of :class:`~hf_apar.data.collator.DataCollatorForApar` reads, in its mode ``"dense"``.

    ``structural_ids`` are the tokens that are learnt from the text alone: the control tokens, EOS, and ends of lines. Rows
    hold the tokens in reading order already: what differs is that nobody sees [Fork] and [Child], that a token sees
    the threads before its own, and that what comes before a target may be another thread's last token.

    Raises:
        ConfigurationError: if the batch has no mask of one number for each two tokens.
    """
    ids, labels, mask = batch["input_ids"], batch["shift_labels"], batch["attention_mask"]
    if mask.ndim != 4:
        raise ConfigurationError(
            f"a teacher reads batches of DataCollatorForApar in its mode 'dense', and the attention_mask has the shape "
            f"{tuple(mask.shape)}; use that mode, or teacher_weight=0"
        )
    fork, child = control_ids
    index = torch.arange(ids.shape[1], device=ids.device)
    sees = mask[:, 0] == 0  # (batch, query, key)
    text = (ids != fork) & (ids != child)
    tree = (batch["position_ids"] == 0).cumsum(1)  # (batch, length): roots begin at 0; so does each token of the padding
    before = (tree[:, :, None] == tree[:, None]) & (index[:, None] >= index)
    visible = before & (text[:, None] | (index[:, None] == index))  # (batch, query, key)
    visible_until = index + sees.sum(1)
    has_child = (ids == fork) & (ids.roll(-1, 1) == child)
    following = torch.where(has_child, visible_until.roll(-1, 1), index + 1).clamp(max=len(index) - 1)
    last_text = torch.where(text, index, -1).cummax(1).values
    forked = (sees & (ids == child)[:, None]).any(-1)
    rows, places = (forked & (labels != IGNORED) & ~torch.isin(labels, structural_ids)).nonzero(as_tuple=True)
    return Reading(
        additive(visible, mask.dtype).unsqueeze(1), visible.sum(-1) - 1,  # type: ignore[arg-type]
        rows, places, last_text[rows, following[rows, places] - 1],  # type: ignore[arg-type]
    )  # fmt: skip


def taught(logits: Tensor, teacher: Tensor, how: Reading, labels: Tensor, structural_ids: Tensor) -> Tensor:
    """Return what learning from ``teacher`` in place of the text adds to the sum of the cross-entropies.

    That is, over all targets of the reading, the divergence of the model from the teacher, whose choice is among what is
    not structural, less the cross-entropy of the text.

    Args:
        logits, teacher: (batch, length, vocabulary), of the trees and of their reading.
        labels: (batch, length), the targets.
        structural_ids: as for :func:`reading`.
    """
    lowest = torch.finfo(torch.float32).min  # of a token whose probability is 0: minus infinity times 0 is no number
    own = logits[how.rows, how.places].float().log_softmax(-1)  # (targets, vocabulary)
    told = teacher[how.rows, how.told_at].float().index_fill(-1, structural_ids, lowest).log_softmax(-1)
    of_text = own.gather(1, labels[how.rows, how.places, None])
    return kl_div(own, told, log_target=True, reduction="sum") + of_text.sum()
