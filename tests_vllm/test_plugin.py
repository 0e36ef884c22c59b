"""Installed beside vLLM, the package leaves every other model alone, with either model runner."""

from importlib.metadata import entry_points

from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_plugins

from byte_tokenizer import byte_tokenizer
from hf_apar.serving.vllm import plugin
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


def test_a_model_without_control_tokens_gets_the_parameters_that_it_was_given(tmp_path):
    class Engine:
        """What the plug-in asks of vLLM's engine."""

        class model_config:
            model = "plain"
            skip_tokenizer_init = False

            @staticmethod
            def try_get_generation_config():
                return {}

        @staticmethod
        def get_tokenizer():
            return byte_tokenizer()

    params = SamplingParams(temperature=0.5)
    assert plugin.without_forks(Engine(), params) is params
