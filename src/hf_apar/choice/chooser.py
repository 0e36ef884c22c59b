"""Tokens for all places of a step at once, and what each was chosen from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from hf_apar.choice.paths import Context
from hf_apar.choice.sampling import Sampler
from hf_apar.choice.stopping import Stopper
from hf_apar.generation_settings import padding_token
from hf_apar.protocol import ForkProtocol
from hf_apar.tree.threads import Thread


@dataclass(frozen=True)
class Sampled:
    """A token that was chosen, whether its thread must stop there, and what it was chosen from where that is asked for.

    Where nothing may be chosen it is ``stuck``, and the token means nothing: so may be the place after a wrong guess.
    """

    token: int
    stops: bool
    stuck: bool = False
    logprob: float | None = None
    scores: Tensor | None = None
    logits: Tensor | None = None

    def note(self, thread: Thread) -> None:
        """Note down with ``thread`` what its token was chosen from."""
        for name, value in (("logprobs", self.logprob), ("scores", self.scores), ("logits", self.logits)):
            if value is None:
                continue
            if getattr(thread, name) is None:
                setattr(thread, name, [])
            # a copy: a row of the step's tensor would keep the rows of all rejected guesses
            getattr(thread, name).append(value.clone() if isinstance(value, Tensor) else value)


class Chooser:
    """Chooses by ``sampler`` and judges by ``stopper``; keeps what ``generation_config`` wants returned."""

    def __init__(self, sampler: Sampler, stopper: Stopper, generation_config: GenerationConfig) -> None:
        self.sampler, self.stopper = sampler, stopper
        keep = bool(generation_config.return_dict_in_generate)
        self.keep_scores = keep and bool(generation_config.output_scores)
        self.keep_logits = keep and bool(generation_config.output_logits)

    @classmethod
    def of(
        cls,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        protocol: ForkProtocol,
        prompt_ids: Tensor,
    ) -> Self:
        """Return what chooses as ``generate`` would, which prepared ``processors`` and ``criteria``, by ``protocol``."""
        pad, draws = padding_token(config), bool(config.do_sample)
        sampler = Sampler(processors, protocol, prompt_ids, pad_token_id=pad, do_sample=draws)
        return cls(sampler, Stopper(criteria, protocol.control_ids, prompt_ids, pad_token_id=pad), config)

    def __call__(self, logits: Tensor, contexts: Sequence[Context]) -> list[Sampled]:
        """Return the token chosen for each context; ``logits`` is (contexts, vocabulary)."""
        choices = self.sampler(logits, contexts)
        stops = self.stopper(contexts, choices.tokens)
        logprobs = choices.logprobs() if self.keep_scores else None
        raw = logits.float() if self.keep_logits else None
        return [
            Sampled(
                token,
                stops[index],
                choices.stuck[index],
                None if logprobs is None else logprobs[index],
                choices.scores[index] if self.keep_scores else None,
                None if raw is None else raw[index],
            )
            for index, token in enumerate(choices.tokens)
        ]
