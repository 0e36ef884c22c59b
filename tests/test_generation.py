"""``generate(apar=...)`` as a user of transformers meets it."""

import copy
import pickle

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, StaticCache, TextStreamer

from conftest import CHILD, EOS, FORK, left_padded, random_prompts, tiny_llama
from hf_apar import (
    AparConfig,
    AparGenerationMixin,
    AparStreamer,
    ConfigurationError,
    ControlTokenError,
    ParagraphTree,
    UnsupportedModelError,
    apar_decode,
    disable_apar,
    enable_apar,
)
from hf_apar.choice.sampling import Sampler
from hf_apar.protocol import ControlTokens, NoForks

NO_FORK = AparConfig(fork_bias=float("-inf"))
PROMPTS = left_padded(random_prompts(5, seed=7))

OPTIONS = {
    "greedy": {},
    "greedy, EOS late": {"min_new_tokens": 9},
    "repetition penalty": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "sampled": {"do_sample": True},
    "sampled, warped": {"do_sample": True, "temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    "sampled, typical and penalised": {"do_sample": True, "typical_p": 0.9, "repetition_penalty": 1.3},
    "bad words": {"bad_words_ids": [[3], [5, 6]], "suppress_tokens": [7, 8, FORK, CHILD]},
    "allowed tokens": {"do_sample": True, "prefix_allowed_tokens_fn": lambda row, ids: list(range(row, 20 + len(ids) % 5))},
    "sequence bias": {"sequence_bias": [[[5], 3.0], [[6, 7], -9.0]], "min_new_tokens": 3, "do_sample": True},
    "rare warpers": {
        "do_sample": True,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.01,
        "top_h": 0.9,
        "renormalize_logits": True,
    },
    "lengths": {"min_length": 20, "forced_eos_token_id": 9, "exponential_decay_length_penalty": (12, 1.3)},
    "penalised prompt": {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2},
    "two EOS tokens": {"eos_token_id": [9, EOS], "do_sample": True},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_without_forks_the_tokens_are_those_of_generate(plain_llama, apar_llama, options):
    """Both paths with one seed: rows end at different times, and finished rows must be drawn for all the same."""
    for seed in range(3):
        torch.manual_seed(seed)
        expected = plain_llama.generate(**PROMPTS, max_new_tokens=40, **OPTIONS[options])
        torch.manual_seed(seed)
        got = apar_llama.generate(**PROMPTS, max_new_tokens=40, apar=NO_FORK, **OPTIONS[options])
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("options", OPTIONS)
def test_inference_mode_changes_nothing(apar_llama, options):
    """A tensor of a processor that was made there counts no versions: many an option broke at its second call."""
    written = []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(1)
        with mode():
            written.append(apar_llama.generate(**PROMPTS, max_new_tokens=60, apar=True, **OPTIONS[options]).tolist())
    assert written[0] == written[1]


def test_inference_mode_hides_no_state(apar_llama):
    class Counts(LogitsProcessor):
        def __init__(self):
            self.calls = torch.zeros(1)

        def __call__(self, input_ids, scores):
            self.calls += 1
            return scores

    with torch.inference_mode(), pytest.raises(ConfigurationError, match="Counts"):
        apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=60, logits_processor=[Counts()])


def test_a_cache_of_inference_mode_is_gone_on_with_outside(plain_llama, apar_llama):
    ids = PROMPTS["input_ids"][:1, -6:]
    with torch.inference_mode():
        out = apar_llama.generate(ids, apar=NO_FORK, max_new_tokens=5, return_dict_in_generate=True)
    later = torch.cat([out.sequences.clone(), torch.tensor([[7, 8]])], dim=1)
    expected = plain_llama.generate(later, max_new_tokens=5)
    assert plain_llama.generate(later, past_key_values=out.past_key_values, max_new_tokens=5).tolist() == expected.tolist()


@pytest.mark.parametrize("prompts", [PROMPTS, left_padded(random_prompts(1, seed=3))], ids=["padded", "alone"])
def test_a_repetition_penalty_looks_at_the_tokens_of_a_path_once(apar_llama, prompts, monkeypatch):
    """From 5.24 on transformers has it ignore padding, by a tensor, and each path was read again in each step."""
    monkeypatch.setattr(Sampler, "_along_paths", None)
    tree = apar_llama.generate(
        **prompts, apar=AparConfig(fork_bias=9.0), max_new_tokens=200, repetition_penalty=1.2, return_dict_in_generate=True
    ).trees[0]
    assert len(tree.threads) > 1


def test_without_apar_generate_is_untouched(plain_llama, apar_llama):
    assert torch.equal(apar_llama.generate(**PROMPTS, max_new_tokens=9), plain_llama.generate(**PROMPTS, max_new_tokens=9))


def test_the_bare_callable_does_the_same_as_the_mixin(plain_llama, apar_llama):
    mixin = apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=60)
    bare = plain_llama.generate(**PROMPTS, custom_generate=apar_decode, max_new_tokens=60)
    assert torch.equal(mixin, bare)


class PathRecorder(LogitsProcessor):
    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.tolist())
        return scores


def test_a_processor_sees_each_path_as_its_row(apar_llama):
    recorder = PathRecorder()
    out = apar_llama.generate(
        **PROMPTS, apar=True, max_new_tokens=200, logits_processor=[recorder], return_dict_in_generate=True
    )
    padded = PROMPTS["input_ids"].tolist()
    seen = {(row, tuple(ids)) for call in recorder.calls for row, ids in enumerate(call)}
    for row, tree in enumerate(out.trees):
        length = int(PROMPTS["attention_mask"][row].sum())
        for thread in tree.threads:
            new_ids = thread.path_ids[length:]
            own = len(new_ids) - len(thread.tokens)
            for count in range(max(own, 1), len(new_ids) + 1):  # each prefix that the thread sampled from
                assert (row, (*padded[row], *new_ids[:count])) in seen
    assert all(len(call) == len(padded) for call in recorder.calls), "a batch-sized call, as in generate"


def test_sequences_are_padded_on_the_right_with_eos_last(apar_llama):
    out = apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=300, return_dict_in_generate=True)
    start = PROMPTS["input_ids"].shape[1]
    for row, tree in enumerate(out.trees):
        answer = tree.token_ids
        assert out.sequences[row, start:].tolist()[: len(answer) + 1] == [*answer, EOS]
        assert set(out.sequences[row, start + len(answer) :].tolist()) == {EOS}
        assert not {FORK, CHILD} & set(answer)


def test_a_tree_goes_to_json_and_back(apar_llama):
    tree = apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=90, return_dict_in_generate=True).trees[0]
    again = ParagraphTree.from_dict(tree.to_dict())
    assert [vars(thread) for thread in again.threads] == [vars(thread) for thread in tree.threads]
    assert again.token_ids == tree.token_ids


def test_a_plain_streamer_gets_the_answer_in_reading_order(apar_llama):
    class Words:
        def decode(self, ids, **kwargs):
            return "".join(f"{int(token)} " for token in ids)

    class Lines(TextStreamer):
        def __init__(self):
            super().__init__(Words(), skip_prompt=True)
            self.text, self.ends = "", 0

        def on_finalized_text(self, text, stream_end=False):
            self.text += text
            self.ends += stream_end

    for seed in range(4):
        streamer, ids = Lines(), torch.tensor(random_prompts(1, seed))
        out = apar_llama.generate(ids, apar=True, max_new_tokens=200, streamer=streamer)
        assert [int(word) for word in streamer.text.split()] == out[0, ids.shape[1] :].tolist()
        assert streamer.ends == 1


def test_enabling_is_reversible_idempotent_and_keeps_names():
    model = tiny_llama()
    plain = type(model)
    assert enable_apar(enable_apar(model)) is model
    assert type(model).__name__ == plain.__name__ and isinstance(model, AparGenerationMixin) and isinstance(model, plain)
    assert type(model).__mro__.count(AparGenerationMixin) == 1
    assert type(disable_apar(model)) is plain
    assert type(disable_apar(model)) is plain
    with pytest.raises((TypeError, ValueError), match="apar"):
        model.generate(**PROMPTS, apar=True)


def test_enabling_one_model_leaves_others_alone():
    one, other = tiny_llama(), tiny_llama(seed=1)
    enable_apar(one)
    assert not isinstance(other, AparGenerationMixin) and "max_threads" not in other.generation_config.apar_config
    with pytest.raises((TypeError, ValueError), match="apar"):
        other.generate(**PROMPTS, apar=True)
    enable_apar(other, config=AparConfig(max_threads=2))
    assert one.generation_config.apar_config.get("max_threads") is None
    alone = enable_apar(tiny_llama()).generate(**PROMPTS, apar=True, max_new_tokens=50)
    assert one.generate(**PROMPTS, apar=True, max_new_tokens=50).tolist() == alone.tolist()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_an_enabled_model_can_be_copied_and_pickled(apar_llama, clone):
    other = clone(apar_llama)
    assert torch.equal(
        other.generate(**PROMPTS, apar=True, max_new_tokens=50), apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=50)
    )


def test_settings_and_ids_travel_with_the_checkpoint(tmp_path, apar_llama):
    model = enable_apar(tiny_llama(), config=AparConfig(max_threads=3, max_depth=2, fork_bias=0.5))
    model.save_pretrained(tmp_path)
    assert '"LlamaForCausalLM"' in (tmp_path / "config.json").read_text()
    again = enable_apar(type(tiny_llama()).from_pretrained(tmp_path))
    assert again.generation_config.apar_config == model.generation_config.apar_config
    assert torch.equal(
        again.generate(**PROMPTS, apar=True, max_new_tokens=50), model.generate(**PROMPTS, apar=True, max_new_tokens=50)
    )


REFUSED = {
    "num_beams": ({"num_beams": 3}, "num_beams=3"),
    "guidance_scale": ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
    "dola_layers": ({"dola_layers": "low"}, "dola_layers"),
    "token_healing": ({"token_healing": True}, "token.healing"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation='static'"),
    "stop strings alone": ({"stop_strings": ["x"]}, "pass tokenizer=tokenizer"),
    "static cache object": ({"past_key_values": StaticCache(tiny_llama().config, max_cache_len=64)}, "is a StaticCache"),
    "positions of one's own": ({"position_ids": torch.ones_like(PROMPTS["input_ids"])}, "position_ids other than"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "paged cache": ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
    "an ensemble": ({"assistant_model": tiny_llama(), "assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight=0.5"),
    "synced ranks": ({"synced_gpus": True}, "synced_gpus cannot"),
    "token types": ({"token_type_ids": torch.ones_like(PROMPTS["input_ids"])}, "token_type_ids"),
    "drafts of no token": ({"prompt_lookup_num_tokens": 0}, "must be 1 or more"),
    "a wrong apar": ({"apar": "yes"}, "pass True, False or an AparConfig"),
    "two strategies": ({"custom_generate": apar_decode}, "two decoding strategies"),
    "two sources of drafts": ({"assistant_model": object(), "prompt_lookup_num_tokens": 3}, "all make drafts"),
    "another vocabulary": ({"assistant_model": tiny_llama(vocab_size=200)}, "knows 200 tokens and the model 48"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_threads_cannot_follow_is_refused_by_name(apar_llama, case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        apar_llama.generate(**PROMPTS, **{"apar": True} | options, max_new_tokens=5)


def test_a_control_token_in_a_prompt_is_an_error_with_the_way_out(apar_llama):
    for token in (FORK, CHILD):
        with pytest.raises(ControlTokenError, match="split_special_tokens=True"):
            apar_llama.generate(torch.tensor([[1, token, 2]]), apar=True, max_new_tokens=5)


def test_right_padding_is_an_error(apar_llama):
    with pytest.raises(ConfigurationError, match="pad on the left"):
        apar_llama.generate(torch.tensor([[1, 2, 0]]), attention_mask=torch.tensor([[1, 1, 0]]), apar=True, max_new_tokens=5)


def test_a_model_without_control_tokens_is_an_error_with_the_way_out():
    model = tiny_llama()
    model.generation_config.apar_config = None
    with pytest.raises(ControlTokenError, match="add_control_tokens"):
        enable_apar(model)
    with pytest.raises(ControlTokenError, match="add_control_tokens"):
        model.generate(**PROMPTS, custom_generate=apar_decode, max_new_tokens=5)


def test_weights_that_are_shared_out_among_processes_are_refused(apar_llama, monkeypatch):
    """Ranks whose answers take different numbers of steps would wait for each other for ever."""
    monkeypatch.setattr("hf_apar.checks.is_fsdp_managed_module", lambda model: True)
    assert apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=2) is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="shared out among processes"):
        apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=2)


def test_models_that_cannot_attend_along_a_tree_are_refused_by_property():
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        DogeConfig,
        DogeForCausalLM,
        GPTNeoConfig,
        GPTNeoForCausalLM,
        MambaConfig,
        MambaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    flash = tiny_llama()
    flash.config._attn_implementation_internal = "flash_attention_2"  # as if loaded with it, which needs a GPU
    small = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1}
    refused = [
        (BloomForCausalLM(BloomConfig(**small, n_layer=1, n_head=2)), "position_ids"),
        (MambaForCausalLM(MambaConfig(**small)), "recurrent|state|kind"),
        (
            T5ForConditionalGeneration(T5Config(vocab_size=48, d_model=16, d_ff=16, num_layers=1, num_heads=2)),
            "encoder-decoder",
        ),
        (GPTNeoForCausalLM(GPTNeoConfig(vocab_size=48, hidden_size=16, num_layers=2, num_heads=2,
                                        attention_types=[[["global", "local"], 1]])), "masks attention by itself"),
        (DogeForCausalLM(DogeConfig(**small, num_attention_heads=2, intermediate_size=16)), "masks attention by itself"),
        (flash, "flash_attention_2 attention, which takes no tree mask"),
    ]
    for model, message in refused:
        model.generation_config.apar_config = {"fork_token_id": FORK, "child_token_id": CHILD}
        with pytest.raises(UnsupportedModelError, match=message):
            enable_apar(model)


def test_an_instance_level_generate_is_detected():
    model = tiny_llama()
    model.generate = lambda *args, **kwargs: None
    with pytest.raises(UnsupportedModelError, match=r"del model\.generate"):
        enable_apar(model)


def test_learned_positions_work_too():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=EOS, bos_token_id=None)
    )
    model.generation_config.pad_token_id = EOS
    model.generation_config.apar_config = {"fork_token_id": FORK, "child_token_id": CHILD}
    model.generation_config.suppress_tokens = [FORK, CHILD]
    expected = model.eval().generate(**PROMPTS, max_new_tokens=30)
    assert torch.equal(enable_apar(model).generate(**PROMPTS, apar=NO_FORK, max_new_tokens=30), expected)


def test_wrong_settings_name_the_right_ones():
    with pytest.raises(ConfigurationError, match="max_threads"):
        AparConfig(max_threads=0)
    with pytest.raises(ConfigurationError, match="the settings are fork_token_id"):
        AparConfig.from_dict({"max_thread": 3})
    with pytest.raises(ConfigurationError, match="must differ"):
        AparConfig(fork_token_id=4, child_token_id=4)


def test_generate_takes_another_protocol(apar_llama):
    rules = NoForks(frozenset({EOS}))
    options = {**PROMPTS, "max_new_tokens": 12, "suppress_tokens": []}
    assert torch.equal(apar_llama.generate(**options, apar=True, protocol=rules), apar_llama.generate(**options))
    for wrong in (NoForks, "paper"):
        with pytest.raises(ConfigurationError, match="pass an object of a subclass of ForkProtocol"):
            apar_llama.generate(**options, apar=True, protocol=wrong)
    settings = AparConfig(max_depth=2, max_threads=4, fork_bias=1.0)
    with pytest.raises(ConfigurationError, match=r"fork_bias, max_depth of apar belong to the control tokens, .* NoForks"):
        apar_llama.generate(**options, apar=settings, protocol=rules)
    strange = ControlTokens(fork_token_id=4, child_token_id=4096)
    with pytest.raises(ConfigurationError, match="ControlTokens names the token 4096, and the model knows 48 tokens"):
        apar_llama.generate(**options, apar=True, protocol=strange)
    with pytest.raises(ConfigurationError, match="need apar"):
        apar_llama.generate(**options, protocol=rules)


def test_what_is_no_streamer_is_told_so(apar_llama):
    for wrong in (AparStreamer, "text", [TextStreamer]):
        with pytest.raises(ConfigurationError, match="pass an object with put and end"):
            apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=4, streamer=wrong)
