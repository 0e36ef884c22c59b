"""What surrounds ``generate(apar=True)``: how a model is enabled and gets back what it was, arguments by place, errors."""

import copy
import pickle

import pytest
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TextStreamer,
)

from byte_tokenizer import byte_tokenizer
from conftest import CHILD, FORK, left_padded, random_prompts, tiny_llama
from hf_apar import (
    AparConfig,
    AparGenerationMixin,
    ConfigurationError,
    ControlTokenError,
    UnsupportedModelError,
    disable_apar,
    enable_apar,
)
from hf_apar.choice.paths import Context
from hf_apar.choice.sampling import Sampler
from hf_apar.protocol import ControlTokens
from hf_apar.speculation.proposer import Draft, Proposer
from hf_apar.tree.threads import Thread

PROMPTS = left_padded(random_prompts(5, seed=7))


class AparLlama(AparGenerationMixin, LlamaForCausalLM):
    """A class that has the mixin by its definition."""


def state(model):
    """What enabling may change: the class, the object's own attributes, and the generation config with its private ones."""
    kept = {name: id(value) for name, value in vars(model).items() if name != "generation_config"}
    return type(model), kept, copy.deepcopy(vars(model.generation_config)), id(model.generation_config)


# L8: the mixin is a GenerationMixin, and arguments by place are those of transformers


def test_l8_the_mixin_is_a_generation_mixin_before_the_models_own_classes(apar_llama):
    names = [one.__name__ for one in type(apar_llama).__mro__]
    assert issubclass(AparGenerationMixin, GenerationMixin)
    assert names.index("AparGenerationMixin") < names.index("LlamaPreTrainedModel") < names.index("GenerationMixin")


class Tokens(TextStreamer):
    def __init__(self):
        super().__init__(None)
        self.seen = []

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.seen.append("end")


@pytest.mark.parametrize("apar", [None, True])
@pytest.mark.parametrize("count", range(1, 12))
def test_l8_arguments_by_place_bind_as_transformers_own(plain_llama, apar_llama, apar, count):
    """FIELD L8: all the eleven arguments of ``generate``, of which the first ``count`` are given by their place."""
    ids = torch.tensor(random_prompts(1, seed=3))

    def arguments(streamer):
        config = GenerationConfig(max_new_tokens=12, do_sample=False)
        return {
            "inputs": ids, "generation_config": config, "logits_processor": LogitsProcessorList(),
            "stopping_criteria": StoppingCriteriaList(), "prefix_allowed_tokens_fn": lambda row, new: list(range(40)),
            "synced_gpus": False, "assistant_model": None, "streamer": streamer, "negative_prompt_ids": None,
            "negative_prompt_attention_mask": None, "custom_generate": None,
        }  # fmt: skip

    def called(model, **more):
        streamer = Tokens()
        named = arguments(streamer)
        placed = [named.pop(name) for name in list(named)[:count]]
        return model.generate(*placed, **named, **more).tolist(), streamer.seen

    (expected, seen), (got, ours) = called(plain_llama), called(apar_llama, apar=apar)  # no [Fork] is among the first forty
    assert got == expected
    assert [token for part in ours[1:-1] for token in part] == [token for part in seen[1:-1] for token in part]
    assert ours[-1] == "end"


@pytest.mark.parametrize("apar", [None, True])
def test_l8_an_argument_that_is_given_twice_is_the_type_error_of_the_call(apar_llama, apar):
    with pytest.raises(TypeError, match="multiple values for argument 'inputs'"):
        apar_llama.generate(PROMPTS["input_ids"], inputs=PROMPTS["input_ids"], apar=apar)
    with pytest.raises(TypeError, match=r"too many positional arguments|takes from 1 to 12 positional"):
        apar_llama.generate(*[None] * 12, apar=apar)


def test_l8_a_class_may_have_the_mixin_by_its_definition(apar_llama, tmp_path):
    """It pickles, copies, loads, and is not disabled by changing an object of another class."""
    expected = apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=50).tolist()
    apar_llama.save_pretrained(tmp_path)
    model = AparLlama.from_pretrained(tmp_path).eval()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), enable_apar(model)):
        assert type(one) is AparLlama
        assert one.generate(**PROMPTS, apar=True, max_new_tokens=50).tolist() == expected
    with pytest.raises(UnsupportedModelError, match="AparLlama is a subclass of AparGenerationMixin by its definition"):
        disable_apar(model)
    assert model.generate(**PROMPTS, apar=True, max_new_tokens=50).tolist() == expected


def test_what_cannot_generate_is_refused():
    model = LlamaModel(LlamaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel cannot generate, .* AutoModelForCausalLM"):
        enable_apar(model)


# L4: enabling suppresses the control tokens in plain decoding, and disabling gives back what was


def without_settings(**changes):
    model = tiny_llama(**changes)
    del model.generation_config.apar_config
    model.generation_config.suppress_tokens = None
    return model


@pytest.mark.parametrize("kept", [None, [5]])
def test_l4_an_enabled_model_loses_no_detail_in_plain_decoding_and_is_given_back_as_it_was(kept):
    """FIELD L4: a model that carries no settings, and a tokenizer that knows the tokens."""
    plain, model = without_settings(), without_settings()
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[Fork]", "[Child]"], special_tokens=True)
    tokenizer.get_vocab = lambda: {"[Fork]": FORK, "[Child]": CHILD}
    plain.generation_config.suppress_tokens = model.generation_config.suppress_tokens = kept
    before = state(model)
    assert FORK in plain.generate(**PROMPTS, max_new_tokens=60).flatten().tolist(), "[Fork] would stand in the text"
    banned = [*(kept or []), FORK, CHILD]
    expected = plain.generate(**PROMPTS, max_new_tokens=60, suppress_tokens=banned)
    for _ in range(2):
        enable_apar(model, tokenizer)
    assert model.generation_config.suppress_tokens == banned
    assert model.generate(**PROMPTS, max_new_tokens=60).tolist() == expected.tolist()
    out = model.generate(**PROMPTS, apar=True, max_new_tokens=300, return_dict_in_generate=True)
    assert max(len(tree.threads) for tree in out.trees) > 1
    assert state(disable_apar(model)) == before


def test_l4_disabling_leaves_what_the_user_set_meanwhile():
    model = enable_apar(without_settings(), config=_config())
    model.generation_config.suppress_tokens = [7, FORK, CHILD]
    model.generation_config.temperature = 0.5
    disable_apar(model)
    assert model.generation_config.suppress_tokens == [7, FORK, CHILD]
    assert model.generation_config.temperature == 0.5
    assert not hasattr(model.generation_config, "apar_config")


def _config():
    return AparConfig(fork_token_id=FORK, child_token_id=CHILD)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_enabled_model_is_disabled_as_exactly(clone):
    model = without_settings()
    before = model.generation_config.to_dict()
    copied = disable_apar(clone(enable_apar(model, config=_config())))
    assert copied.generation_config.to_dict() == before and type(copied) is LlamaForCausalLM


def test_l4_ids_without_rows_are_refused_when_the_model_is_enabled():
    model = without_settings(vocab_size=48)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[Fork]", "[Child]"], special_tokens=True)
    with pytest.raises(ControlTokenError, match=r"is outside the vocabulary of LlamaForCausalLM, 48 tokens; call add"):
        enable_apar(model, tokenizer)


# what a caller allows does not lift what the protocol bans


@pytest.mark.parametrize("allowed", [[FORK], [CHILD], [FORK, CHILD]])
@pytest.mark.parametrize("do_sample", [False, True])
def test_control_tokens_are_banned_though_nothing_else_is_allowed(apar_llama, allowed, do_sample):
    """transformers lifts a ban where its constraint allows nothing else: forks went below ``max_depth``."""
    with pytest.raises(ConfigurationError, match="leave a thread no token but those that ControlTokens bans there"):
        apar_llama.generate(
            **PROMPTS, apar=True, max_new_tokens=9, do_sample=do_sample, prefix_allowed_tokens_fn=lambda row, path: allowed
        )


def test_a_guess_may_lead_to_where_nothing_is_allowed():
    """It is not followed then, and must not break the answer that it was made for."""
    protocol = ControlTokens(fork_token_id=FORK, child_token_id=CHILD)
    only_forks = LogitsProcessorList([PrefixConstrainedLogitsProcessor(lambda row, path: [FORK], 1)])
    sampler = Sampler(only_forks, protocol, torch.tensor([[5]]), pad_token_id=0, do_sample=True)
    thread = Thread(0, None, 0, 1, [5])

    def after(*guesses):
        return Context.after(thread, guesses, protocol, row=0, prompt_length=1)

    assert sampler(torch.zeros(1, 50), [after()]).tokens == [FORK]
    guessed = after(FORK)
    assert FORK in guessed.banned and sampler(torch.zeros(1, 50), [guessed]).stuck == [True]
    thread.path_ids.append(FORK)
    assert sampler(torch.zeros(2, 50), [after(), after(6)]).stuck == [True, False]


def test_tokens_that_have_an_embedding_and_no_logit_are_left_out():
    """As transformers does, whose input embeddings may be padded beyond the output layer."""
    protocol, prompt = ControlTokens(fork_token_id=FORK, child_token_id=CHILD), torch.tensor([[5, 60, 7]])
    penalty = RepetitionPenaltyLogitsProcessor(1.7)
    sampler = Sampler(LogitsProcessorList([penalty]), protocol, prompt, pad_token_id=0, do_sample=False)
    thread = Thread(0, None, 0, 1, [5, 60, 7, 9, 50], start=3)
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    contexts = [Context.after(thread, guesses, protocol, row=0, prompt_length=3) for guesses in ([], [11, 77])]
    scores, _ = sampler.scores(logits, contexts)
    for row, ids in enumerate(([5, 60, 7, 9, 50], [5, 60, 7, 9, 50, 11, 77])):
        expected = penalty(torch.tensor([ids]), logits[row : row + 1])[0]
        text = [token for token in range(50) if token not in (FORK, CHILD)]
        assert torch.equal(scores[row][text], expected[text])


class Guesses(Proposer):
    """Guesses the same tokens for every thread."""

    def __init__(self, *tokens):
        self.tokens, self.longest, self.schedule = tokens, len(tokens), "constant"

    def propose(self, rows, limits):
        return [[Draft(self.tokens) for _ in row.live] for row in rows]


def test_a_right_guess_leads_to_no_banned_token(apar_llama):
    """A thread that may not fork, where nothing else is allowed: with a guess before it a fork was written."""
    start = PROMPTS["input_ids"].shape[1]

    def allowed(row, path):
        return [7] if len(path) < start + 3 else [FORK]

    options = {"apar": AparConfig(max_depth=1), "max_new_tokens": 9, "prefix_allowed_tokens_fn": allowed}
    for proposer in (None, Guesses(7, 7, 7)):
        with pytest.raises(ConfigurationError, match="leave a thread no token but those that ControlTokens bans there"):
            apar_llama.generate(**PROMPTS, **options, proposer=proposer)


class Sevens(LogitsProcessor):
    """A grammar of sevens and of nothing else: after any other token, nothing."""

    stateless = True

    def __init__(self, start):
        self.start = start

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids[:, self.start :].tolist()):
            scores[row, 7] = 0.0 if {*ids} <= {7} else -torch.inf
        return scores


def test_a_wrong_guess_off_a_grammar_changes_nothing(apar_llama):
    """Nothing can be drawn after it; the draw was made all the same, and broke the call."""
    options = {"apar": True, "do_sample": True, "max_new_tokens": 6}
    grammar = LogitsProcessorList([Sevens(PROMPTS["input_ids"].shape[1])])
    alone = apar_llama.generate(**PROMPTS, **options, logits_processor=grammar)
    drafted = apar_llama.generate(**PROMPTS, **options, logits_processor=grammar, proposer=Guesses(7, 8, 7))
    assert torch.equal(alone, drafted) and set(alone[:, PROMPTS["input_ids"].shape[1] :].flatten().tolist()) == {7}


@pytest.mark.parametrize("do_sample", [False, True])
def test_what_is_allowed_is_asked_about_paths_alone(apar_llama, do_sample):
    """Not about padding in place of a path, to which a trie has no answer."""
    start, asked = PROMPTS["input_ids"].shape[1], []
    pad = 3  # another token than the one that ends

    def allowed(row, path):
        new = path[start:].tolist()
        asked.append(new)
        assert torch.equal(path[:start], PROMPTS["input_ids"][row])
        return [] if new[:1] == [pad] else list(range(4, 48))

    torch.manual_seed(0)
    apar_llama.generate(
        **PROMPTS, apar=True, do_sample=do_sample, pad_token_id=pad, max_new_tokens=30, prefix_allowed_tokens_fn=allowed
    )
    assert asked and not any(new[:1] == [pad] for new in asked)


def test_a_length_that_the_prompt_has_already_leaves_one_token(plain_llama, apar_llama):
    start = PROMPTS["input_ids"].shape[1]
    options = {**PROMPTS, "max_new_tokens": 5, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(start - 1)])}
    assert plain_llama.generate(**options).shape[1] == start + 1
    out = apar_llama.generate(**options, apar=True, return_dict_in_generate=True)
    assert out.sequences.shape[1] == start + 1 and [one.steps for one in out.stats] == [1] * len(PROMPTS["input_ids"])


def test_small_chunks_of_a_prompt_add_no_step_to_a_fork(apar_llama):
    """[Fork] is fed by the parent in the step that feeds the child."""
    options = {"apar": True, "max_new_tokens": 120, "return_dict_in_generate": True}
    whole, chunked = (apar_llama.generate(**PROMPTS, **options, **more) for more in ({}, {"prefill_chunk_size": 1}))
    assert any(len(tree.threads) > 3 for tree in whole.trees) and torch.equal(whole.sequences, chunked.sequences)
    assert [one.steps for one in whole.stats] == [one.steps for one in chunked.stats]
