"""Installed beside vLLM, the package leaves every other model alone, with either model runner."""

from importlib.metadata import entry_points

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_plugins

from byte_tokenizer import byte_tokenizer
from hf_apar.errors import ConfigurationError
from hf_apar.serving.admission import EqualShare, FixedCap
from hf_apar.serving.vllm import online, plugin, set_policy
from hf_apar.serving.vllm.engine import banned


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


class Processor:
    """What the plug-in asks of vLLM's input processor."""

    class model_config:
        model = "plain"

        @staticmethod
        def try_get_generation_config():
            return {}

    tokenizer = byte_tokenizer()


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
