"""When a thread must stop: stop strings and stopping criteria, judged on each thread's path; and the clock."""

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.stopping_criteria import ConfidenceCriteria, EosTokenCriteria, MaxLengthCriteria

from hf_apar.choice.paths import Context, rounds
from hf_apar.choice.purity import Pure
from hf_apar.errors import ConfigurationError

_NOTHING = torch.empty(1, 0, dtype=torch.long)  # what a clock is shown: on the CPU, so that nobody waits for a GPU
_NO_TOKEN = 2**31 - 1  # beyond any vocabulary: there, a criterion of transformers finds no text


class Stopper:
    """Judges every token that was chosen by the criteria that ``generate`` prepared.

    A criterion sees a path as the answer reads: the control tokens between a prefix and its child are left out, so
    that a stop string may begin in a title and end in its detail; a [Fork] after which the same thread goes on stays
    in, since there the answer reads on elsewhere. EOS tokens and the length are the loop's own business.

    Args:
        criteria: what ``generate`` prepared; a custom criterion gets ``scores=None``.
        never: tokens that are no text and never stop.
        prompt_ids: (batch, prompt), padded on the left.

    Raises:
        ConfigurationError: for a criterion that keeps state across calls.
    """

    def __init__(
        self, criteria: StoppingCriteriaList, never: frozenset[int], prompt_ids: Tensor, *, pad_token_id: int
    ) -> None:
        self.never = never
        self.prompt_ids, self.pad_token_id = prompt_ids, pad_token_id
        self.clocks = StoppingCriteriaList(one for one in criteria if isinstance(one, MaxTimeCriteria))
        ours = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)
        if any(isinstance(one, ConfidenceCriteria) for one in criteria):
            raise ConfigurationError(
                "ConfidenceCriteria judges the drafts of an assistant; leave it out, and pass assistant_confidence_threshold"
            )
        self.strings = [_StopStrings(one, never) for one in criteria if isinstance(one, StopStringCriteria)]
        # the list takes from each criterion what generate takes: a tensor or an array of the rows, or one bool for all
        self.criteria = StoppingCriteriaList(
            Pure(one) for one in criteria if not isinstance(one, (*ours, StopStringCriteria))
        )

    @property
    def out_of_time(self) -> bool:
        """Has ``max_time`` passed?"""
        return bool(self.clocks) and bool(self.clocks(_NOTHING, None).any())

    def __call__(self, contexts: Sequence[Context], tokens: Sequence[int]) -> list[bool]:
        """Return whether each thread must stop once it has written its token."""
        stops = [False] * len(contexts)
        if not self.strings and not self.criteria:
            return stops
        for strings in self.strings:
            stops = [before or here for before, here in zip(stops, strings(contexts, tokens), strict=True)]
        if self.criteria:
            texts = [context.as_read(token) for context, token in zip(contexts, tokens, strict=True)]
            for batch in rounds(self.prompt_ids, texts, self.pad_token_id):
                verdict = self.criteria(batch.input_ids, None).tolist()
                for index, row in zip(batch.indices, batch.rows, strict=True):
                    stops[index] |= bool(verdict[row])
        return [stop and token not in self.never for stop, token in zip(stops, tokens, strict=True)]


class _StopStrings:
    """Stop strings at the ends of many paths at once, by the last tokens alone, on the CPU where these are.

    Control tokens are no text: transformers would find stop strings in their names, ``]`` in ``[Fork]``.
    """

    def __init__(self, criterion: StopStringCriteria, never: Collection[int]) -> None:
        self.criterion, self.never = criterion, never

    def __call__(self, contexts: Sequence[Context], tokens: Sequence[int]) -> list[bool]:
        most = self.criterion.maximum_token_len
        ends = [context.last_read(token, most) for context, token in zip(contexts, tokens, strict=True)]
        texts = [[_NO_TOKEN if token in self.never else token for token in end] for end in ends]
        rows = torch.tensor([[_NO_TOKEN] * (most - len(text)) + text for text in texts])
        return [bool(stop) for stop in self.criterion(rows, None).tolist()]


def with_limits(generation_config: GenerationConfig, criteria: StoppingCriteriaList) -> GenerationConfig:
    """Return ``generation_config`` with the EOS tokens and the length that ``criteria`` hold: a caller's own come first."""
    lengths = [one.max_length for one in criteria if isinstance(one, MaxLengthCriteria)]
    ends = [one.eos_token_id.tolist() for one in criteria if isinstance(one, EosTokenCriteria)]
    result = copy.copy(generation_config)
    if lengths:
        result.max_length = min(lengths)
    result.eos_token_id = list(dict.fromkeys(token for tokens in ends for token in tokens)) or None
    return result


def stop_string_criteria(
    strings: str | Sequence[str] | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[StoppingCriteria]:
    """Return stop strings as a criterion: none, or one.

    Raises:
        ConfigurationError: if there are stop strings and no tokenizer.
    """
    if not strings:
        return []
    if tokenizer is None:
        raise ConfigurationError("stop_strings are found in text; pass tokenizer=tokenizer to generate too")
    return [StopStringCriteria(tokenizer, list(strings) if not isinstance(strings, str) else strings)]
