"""One prompt decoded plainly and with APAR, by the same model with the same options, on the same clock."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.cli.live import LiveText, LiveTree
from hf_apar.config import AparConfig
from hf_apar.generation_settings import eos_token_ids
from hf_apar.replay import Recorder, Trace
from hf_apar.results import AparStats
from hf_apar.speculation.proposer import Proposer


@dataclass(frozen=True)
class Recorded:
    """How an answer came about, as it was noted; reading it takes a while, so nobody does before it is wanted."""

    recorder: Recorder
    tokenizer: PreTrainedTokenizerBase
    question: str

    def trace(self) -> Trace:
        """Return what a page is made of."""
        return self.recorder.trace(self.tokenizer, question=self.question)


@dataclass(frozen=True)
class Result:
    """What one way of decoding gave: the answer, its tokens without control tokens and EOS, the wall-clock seconds.

    ``unfinished`` counts the threads that the limit of tokens cut; plain decoding has one thread. ``recorded`` is there
    where it was asked for.
    """

    text: str
    tokens: int
    seconds: float
    unfinished: int
    recorded: Recorded | None = field(default=None, kw_only=True)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class AparResult(Result):
    """What decoding with forks gave, and how its threads went."""

    stats: AparStats
    tree: dict[str, object]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came while an answer was shown: ``text`` is what was written of it, ``recorded`` how, where that is noted."""

    def __init__(self, text: str, recorded: Recorded | None) -> None:
        super().__init__()
        self.text, self.recorded = text, recorded


@dataclass(frozen=True)
class Method:
    """A loaded model, an encoded prompt and the options of ``generate`` that both ways share.

    ``proposer`` serves APAR; ``question`` stands at the head of traces, which are noted where there is one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: list[int]
    max_new_tokens: int
    options: dict[str, object]
    seed: int
    show: bool
    proposer: Proposer | None = None
    question: str | None = None

    def warm_up(self, config: AparConfig) -> None:
        """Decode a few tokens both ways: the first pass through a model pays for things that later ones do not."""
        self._generate(max_new_tokens=4)
        self._generate(max_new_tokens=4, apar=config, proposer=self.proposer)
        with torch.no_grad():  # a wide step, which these may not have
            self.model(torch.zeros(1, 8, dtype=torch.long, device=self.model.device))

    def plain(self) -> Result:
        """Decode token by token, with the model's own ``generate``."""
        view = LiveText(self.tokenizer) if self.show else None
        output, seconds, recorded = self._shown(view)
        new = output.sequences[0, len(self.prompt) :].tolist()  # type: ignore[attr-defined]
        tokens = sum(token not in self.tokenizer.all_special_ids for token in new)  # as APAR's statistics count
        assert self.model.generation_config is not None
        cut = len(new) >= self.max_new_tokens and new[-1] not in eos_token_ids(self.model.generation_config)
        text = str(self.tokenizer.decode(new, skip_special_tokens=True))
        return Result(text, tokens, seconds, int(cut), recorded=recorded)

    def apar(self, config: AparConfig) -> AparResult:
        """Decode with forks."""
        view = LiveTree(self.tokenizer) if self.show else None
        wanted = {} if self.question is None else {"output_scores": True}
        output, seconds, recorded = self._shown(view, apar=config, proposer=self.proposer, **wanted)
        tree, stats = output.trees[0], output.stats[0]  # type: ignore[attr-defined]
        unfinished = sum(thread.finish_reason == "length" for thread in tree.threads)
        text = tree.text(self.tokenizer)
        return AparResult(text, stats.tokens, seconds, unfinished, stats, tree.to_dict(), recorded=recorded)

    def _shown(self, view: LiveTree | None, **options: object) -> tuple[object, float, Recorded | None]:
        """Generate, and leave on the screen what was written, also where something stops it.

        Raises:
            Interrupted: with Ctrl-C, if the answer is shown.
        """
        recorder = None if self.question is None else Recorder(keep_scores=False)
        try:
            streamers = _Together(one for one in (recorder, view) if one is not None)
            output, seconds = self._generate(streamer=streamers or None, **options)
        except KeyboardInterrupt as error:
            if view is None:
                raise
            raise Interrupted(view.text(), self._recorded(recorder)) from error
        finally:
            if view is not None:
                view.close()
        return output, seconds, self._recorded(recorder)

    def _recorded(self, recorder: Recorder | None) -> Recorded | None:
        if recorder is None or not recorder.times:
            return None
        return Recorded(recorder, self.tokenizer, self.question or "")

    def _generate(self, **options: object) -> tuple[object, float]:
        ids = torch.tensor([self.prompt], device=self.model.device)
        torch.manual_seed(self.seed)
        start = time.perf_counter()
        given = {"max_new_tokens": self.max_new_tokens} | self.options | options
        output = self.model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **given
        )
        return output, time.perf_counter() - start


class _Together(list[Any]):
    """Several streamers, which are one for plain ``generate``."""

    def put(self, value: Tensor) -> None:
        for one in self:
            one.put(value)

    def end(self) -> None:
        for one in self:
            one.end()
