"""The rules of threads and plain requests in the samplers of both model runners; ``test_runners.py`` runs this by itself.

Runner V2 samples with Triton kernels, which Triton's interpreter runs on CPUs. vLLM wants a backend for that, and memory
that a GPU can see: both are said to be there, or not, before it is imported.
"""

# ruff: noqa: E402 - what is set before an import is read by it
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).parents[1] / "tests"))

from triton.backends import backends

backends.clear()
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

from vllm.utils import platform_utils

platform_utils.is_uva_available = lambda: False

import numpy as np
import torch
from vllm import SamplingParams
from vllm.triton_utils import HAS_TRITON
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu.sample.sampler import Sampler as SamplerV2
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from byte_tokenizer import byte_tokenizer
from hf_apar.protocol import ControlTokens
from hf_apar.serving.admission import Load
from hf_apar.serving.answer import Answer, Limits
from hf_apar.serving.driver import Driver, Made
from hf_apar.serving.reading import MadeToken
from hf_apar.serving.vllm.parameters import thread_params
from hf_apar.serving.vllm.plugin import without_forks

CPU = torch.device("cpu")
SLOTS, LENGTH, DRAFTS = 12, 128, 3
TOKENIZER = byte_tokenizer()
TOKENIZER.add_tokens(["[Fork]", "[Child]"], special_tokens=True)
TOKENIZER.max_token_id = len(TOKENIZER) - 1  # as vLLM's own tokenizers say it
VOCABULARY = len(TOKENIZER)
FORK, CHILD = VOCABULARY - 2, VOCABULARY - 1


class Processor:
    """What the plug-in asks of vLLM's input processor."""

    tokenizer = TOKENIZER

    class model_config:
        model = "tiny"

        @staticmethod
        def try_get_generation_config():
            return {"apar_config": {"fork_token_id": FORK, "child_token_id": CHILD}}


PROCESSOR = Processor()


class Recorder:
    """An engine that runs nothing: who writes, and what it has made."""

    def __init__(self):
        self.running = {}

    def start(self, request):
        self.running[request] = []

    def cancel(self, request):
        self.running.pop(request, None)

    def load(self):
        return Load()


class Case:
    """A request of vLLM's: its prompt, what it has made, its drafts, and what must not come after each of those."""

    def __init__(self, prompt, made, drafts, params, banned_after):
        self.prompt, self.made, self.drafts, self.params = prompt, made, drafts, params
        self.banned = [banned_after([*made, *drafts[:count]]) for count in range(len(drafts) + 1)]


def asked(draw, drafting):
    """Draw what a user may ask for; vLLM takes no bias beside drafts."""
    return SamplingParams(
        temperature=0.0,
        bad_words=draw.choice([[], ["a"], ["ab", "q"], ["[F"]]),
        repetition_penalty=draw.choice([1.0, 1.1]),
        presence_penalty=draw.choice([0.0, 0.5]),
        logit_bias=None if drafting else draw.choice([None, {FORK: 50.0, 97: 2.0}]),
    )


def tokens(draw, most):
    return [draw.choice([FORK, CHILD, 64, 65, 97, 98]) for _ in range(draw.randint(0, most))]


def words_after(params, made):
    """Say what the user's own words ban: an independent reading of what vLLM documents."""
    own = SamplingParams(bad_words=params.bad_words)
    own.update_from_tokenizer(TOKENIZER)
    return [word[-1] for word in own.bad_words_token_ids or () if len(made) >= len(word) - 1
            and made[len(made) - len(word) + 1 :] == word[:-1]]  # fmt: skip


def threads(draw, drafting):
    """Let some threads of an answer write at random, and return the requests that run then."""
    rules = ControlTokens(
        fork_token_id=FORK, child_token_id=CHILD, max_depth=draw.randint(1, 3),
        fork_bias=draw.choice([0.0, -torch.inf] if drafting else [0.0, 2.0, -torch.inf]),
    )  # fmt: skip
    engine, params = Recorder(), asked(draw, drafting)
    driver = Driver(engine)
    driver.add(Answer([draw.randrange(FORK) for _ in range(draw.randint(1, 5))], rules, Limits(None, LENGTH), TOKENIZER))
    for _ in range(draw.randint(0, 25)):
        request = draw.choice([*engine.running])
        token = draw.choice([FORK, CHILD, 65, 66, 97])
        engine.running[request].append(token)
        driver.made(Made(request, [MadeToken(token)]))
    for request, made in engine.running.items():

        def after(so_far, request=request):
            return {*request.banned_after(so_far), *words_after(params, so_far)}

        drafts = tokens(draw, DRAFTS) if drafting else []
        yield Case([*request.prompt_ids], [*made], drafts, thread_params(request, params, TOKENIZER), after)


def plain(draw, drafting):
    """Return a request that did not ask for threads, or one to a model without control tokens, which may write anything."""
    params, prompt = asked(draw, drafting), [draw.randrange(FORK) for _ in range(draw.randint(1, 5))]
    always = {FORK, CHILD} if (ours := draw.random() < 0.7) else set()
    if ours:
        given = without_forks(PROCESSOR, params)
    else:
        given = params.clone()
        given.update_from_tokenizer(TOKENIZER)
    return Case(prompt, tokens(draw, 6), tokens(draw, DRAFTS) if drafting else [], given,
                lambda made: always | {*words_after(params, made)})  # fmt: skip


class RunnerV1:
    """The first runner's batch and samplers."""

    def __init__(self):
        bias = LogitBiasLogitsProcessor(None, CPU, False)
        self.batch = InputBatch(SLOTS, LENGTH, 256, CPU, VOCABULARY, [16], [16], LogitsProcessors([bias]), False, DRAFTS)
        self.sampler = Sampler()
        self.rejection = RejectionSampler(self.sampler)

    def logits(self, cases, logits):
        for name in [*self.batch.req_id_to_index]:
            self.batch.remove_request(name)
        self.batch.condense()
        for number, case in enumerate(cases):
            state = CachedRequestState(str(number), case.prompt, [], case.params, None, ([],), 0, case.made)
            place = self.batch.add_request(state)
            self.batch.spec_token_ids[place][:] = case.drafts
            assert place == number
        self.batch.refresh_metadata()
        drafts = [len(case.drafts) for case in cases]
        if not any(drafts):
            return self.sampler.apply_logits_processors(logits, self.batch.sampling_metadata, False)
        last = np.cumsum([count + 1 for count in drafts]) - 1
        others = np.setdiff1d(np.arange(len(logits)), last)
        metadata = SpecDecodeMetadata.make_dummy([case.drafts for case in cases], CPU)
        found = torch.empty_like(logits)
        found[others] = self.rejection.apply_logits_processors(logits[others], self.batch.sampling_metadata, metadata)
        found[last] = self.sampler.apply_logits_processors(logits[last], self.batch.sampling_metadata, True)
        return found


class RunnerV2:
    """The second runner's request slots and sampler."""

    def __init__(self):
        self.states = RequestState(SLOTS, LENGTH, 256, DRAFTS, VOCABULARY, CPU)
        config = SimpleNamespace(reasoning_config=None)
        self.sampler = SamplerV2(config, SLOTS, VOCABULARY, CPU, self.states, num_speculative_tokens=DRAFTS)

    def logits(self, cases, logits):
        for name in [*self.states.req_id_to_index]:
            self.states.remove_request(name)
        random.shuffle(self.states.free_indices)  # a slot holds what another request left there
        for number, case in enumerate(cases):
            self.states.add_request(str(number), len(case.prompt), [*case.prompt, *case.made], 0, 64)
            self.sampler.add_request(self.states.req_id_to_index[str(number)], case.params)
        self.states.apply_staged_writes()
        self.sampler.apply_staged_writes()
        slots = [self.states.req_id_to_index[str(number)] for number in range(len(cases))]
        rows = [(place, row) for place, case in enumerate(cases) for row in range(len(case.drafts) + 1)]
        fed = [[*case.prompt, *case.made][-1:] + case.drafts for case in cases]
        ends = [len(case.prompt) + len(case.made) - 1 for case in cases]
        return self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping=torch.tensor([slots[place] for place, _ in rows]),
            idx_mapping=torch.tensor(slots),
            idx_mapping_np=np.array(slots),
            pos=torch.tensor([ends[place] + row for place, row in rows]),
            input_ids=torch.tensor([fed[place][row] for place, row in rows]),
            expanded_local_pos=torch.tensor([row for _, row in rows]),
            seq_lens_upper_bound_np=np.array(ends) + 1 + DRAFTS,
        )


def check(seed, batches):
    """Compare the two runners, and both with the rules, for ``batches`` batches; return how many rows that were."""
    draw, first, second, compared = random.Random(seed), RunnerV1(), RunnerV2(), 0
    random.seed(seed)
    for number in range(batches):
        drafting = number % 2 == 1
        cases = [case for _ in range(4) for case in [*threads(draw, drafting), plain(draw, drafting)]]
        draw.shuffle(cases)
        cases = cases[:SLOTS]
        expected = [row for case in cases for row in case.banned]
        logits = torch.randn(len(expected), VOCABULARY, generator=torch.Generator().manual_seed(number)) * 4
        ones = [runner.logits(cases, logits.clone()) for runner in (first, second)]
        for found in ones:
            banned = [{*row.isneginf().nonzero().flatten().tolist()} for row in found]
            assert banned == expected
        torch.testing.assert_close(*ones)
        compared += len(expected)
    return compared


if __name__ == "__main__":
    assert HAS_TRITON, "else the kernels of runner V2 are no kernels"
    print(check(int(sys.argv[1]), int(sys.argv[2])))
