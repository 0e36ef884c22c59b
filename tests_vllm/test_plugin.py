"""Installed beside vLLM, the package leaves every other model alone, with either model runner."""

import asyncio
import gc
import inspect
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from vllm import LLM, AsyncEngineArgs, SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_plugins

from hf_apar.errors import ConfigurationError
from hf_apar.serving.admission import EqualShare, FixedCap
from hf_apar.serving.vllm import online, plugin, set_policy
from hf_apar.serving.vllm.parameters import banned
from hf_apar.serving.vllm.stats import EngineLoad, reported

GREEDY = SamplingParams(temperature=0.0, max_tokens=60, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def without(plain_folder):
    """vLLM with a model that knows no control tokens."""
    gc.collect()  # an engine that another test is done with takes vLLM's process groups with it when it goes
    return LLM(str(plain_folder), dtype="float32", max_model_len=1024, enforce_eager=True, num_gpu_blocks_override=400)


def test_h2_model_runner_v2_starts_beside_the_package():
    """FIELD H2: it refuses V1's logits processors that come by entry point, and every model's server with them."""
    assert _load_v2_logitsprocs_plugins() == []
    assert not [one for one in entry_points(group="vllm.logits_processors") if one.dist and one.dist.name == "hf_apar"]


def test_bans_come_on_top_of_the_callers_own(tokenizer_and_model):
    tokenizer, _ = tokenizer_and_model
    tokenizer.max_token_id = len(tokenizer) - 1  # as vLLM's own tokenizers say it
    given = SamplingParams(bad_words=["ab"], temperature=0.0)
    ours = banned(given, tokenizer, [[7], [5, 5]])
    alone = SamplingParams(bad_words=["ab"])
    alone.update_from_tokenizer(tokenizer)
    assert ours.bad_words_token_ids == [*alone.bad_words_token_ids, [7], [5, 5]]
    ours.update_from_tokenizer(tokenizer)  # vLLM does so again for each request
    assert ours.bad_words_token_ids == [*alone.bad_words_token_ids, [7], [5, 5]]
    assert given.bad_words == ["ab"] and given.bad_words_token_ids is None


def test_a_model_without_control_tokens_gets_the_very_same_objects(without, monkeypatch, prompts):
    processor, params = without.llm_engine.input_processor, SamplingParams(temperature=0.5)
    assert plugin.without_forks(processor, params) is params
    beam, outputs = SamplingParams(max_tokens=1, logprobs=4, detokenize=False), object()
    assert plugin.without_candidates(processor, beam, outputs) is outputs
    for drawing in ({"temperature": 0.0}, {"seed": 3}):
        params = SamplingParams(max_tokens=60, logprobs=3, prompt_logprobs=2, repetition_penalty=1.1, **drawing)
        beside = without.generate(prompts, params, use_tqdm=False)
        with monkeypatch.context() as patch:
            own = inspect.getclosurevars(InputProcessor.process_inputs).nonlocals["processed"]
            patch.setattr(InputProcessor, "process_inputs", own)
            alone = without.generate(prompts, params, use_tqdm=False)
        assert [(one.prompt_logprobs, one.outputs) for one in beside] == [
            (one.prompt_logprobs, one.outputs) for one in alone
        ]


def test_a_checkpoint_without_control_tokens_writes_what_the_whole_one_writes_plainly(without, prompts, tokenizer_and_model):
    model = tokenizer_and_model[1]
    for prompt, output in zip(prompts, without.generate(prompts, GREEDY, use_tqdm=False), strict=True):
        plain = model.generate(torch.tensor([prompt]), apar=False, max_new_tokens=60)
        assert list(output.outputs[0].token_ids) == plain[0, len(prompt) :].tolist()


def test_a_prompt_that_comes_bit_by_bit_is_answered_without_control_tokens(folder, prompts, control):
    async def answered():
        arguments = AsyncEngineArgs(
            str(folder), dtype="float32", max_model_len=1024, enforce_eager=True, block_size=32, num_gpu_blocks_override=100
        )
        engine, ids = AsyncLLM.from_engine_args(arguments), []
        try:
            for says in (None, {"apar": 1}, {"apar": "thread"}):
                params = SamplingParams(temperature=0.0, max_tokens=30, output_kind=RequestOutputKind.DELTA, extra_args=says)

                async def parts(params=params):
                    yield StreamingInput(tokens_input(prompts[3]), params)

                made = [one.outputs[0].token_ids async for one in engine.generate(parts(), params, str(says))]
                ids.append([token for tokens in made for token in tokens])
        finally:
            engine.shutdown()
        return ids

    unsaid, asked, thread = asyncio.run(answered())
    assert unsaid == asked and len(unsaid) > 10 and not control & {*unsaid}
    assert control & {*thread}, "left alone the model forks"


def test_two_engines_of_a_process_tell_their_own_load():
    configs = [
        SimpleNamespace(
            cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=11),
            scheduler_config=SimpleNamespace(max_num_seqs=seats),
        )
        for seats in (8, 9)
    ]
    loggers = [EngineLoad(config, rank) for config in configs for rank in (0, 1)]
    for number, logger in enumerate(loggers):
        logger.record(SimpleNamespace(num_running_reqs=number, num_waiting_reqs=0, kv_cache_usage=0.5), None)
    found = [reported(config, rank) for config in configs for rank in (0, 1)]
    assert [(one.running, one.max_running, one.kv_tokens) for one in found] == [
        (0, 8, 160), (1, 8, 160), (2, 9, 160), (3, 9, 160),
    ]  # fmt: skip
    assert reported(SimpleNamespace(), 0) is None


def test_more_bad_words_than_vllm_has_room_for_are_refused_before_an_engine_dies_of_them(tokenizer_and_model):
    tokenizer, _ = tokenizer_and_model
    tokenizer.max_token_id = len(tokenizer) - 1
    letters = [chr(letter) for letter in range(33, 127)] + [chr(letter) + "a" for letter in range(33, 127)]
    runs = [[5], [6]]
    fits = banned(SamplingParams(bad_words=letters[:126]), tokenizer, runs)
    assert len(fits.bad_words_token_ids) == 128 and fits.bad_words_token_ids[-2:] == runs
    for words in (letters[:127], ["a" * 600, "b" * 500]):
        with pytest.raises(VLLMValidationError, match="control tokens among them, and this server takes 128 of 1024"):
            banned(SamplingParams(bad_words=words), tokenizer, runs)


def test_a_policy_is_set_for_engines_that_run_and_for_those_to_come():
    class Engine:
        """What is served."""

        vllm_config = None

    first, second, start = Engine(), Engine(), online.engine_of
    assert start(first, None) is start(first, None) is not start(first, 0)
    assert start(first, None).driver.admission.policy == EqualShare()
    try:
        set_policy(FixedCap(2))
        policies = [start(engine, rank).driver.admission.policy for engine in (first, second) for rank in (None, 0)]
        assert policies == [FixedCap(2)] * 4
    finally:
        set_policy(EqualShare())


def test_a_policy_that_the_environment_misnames_is_told_when_the_server_starts(monkeypatch):
    monkeypatch.setenv("APAR_POLICY", "fair")
    with pytest.raises(ConfigurationError, match="eager, cap:N or share:N"):
        plugin.register()


def test_a_second_registration_changes_nothing():
    plugin.register()
    once = AsyncLLM.generate
    plugin.register()
    assert AsyncLLM.generate is once and once.__module__ == plugin.__name__
