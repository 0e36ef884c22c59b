"""FIELD L9: whatever raises in the middle of a run, the models are as before, streamers have ended, the next run is right.

What is called that is not ours raises here at one of its calls: processors, criteria, streamers, proposers, the models.
"""

import copy
import threading
from contextlib import contextmanager
from functools import partial
from itertools import count

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, TextIteratorStreamer

from conftest import CHILD, FORK, random_prompts, tiny_llama
from hf_apar import AparStreamer, ConfigurationError, apar_decode, enable_apar
from hf_apar.forward import attention
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from hf_apar.speculation.proposer import Draft, Proposer

ONE = {"input_ids": torch.tensor(random_prompts(1, seed=34))}
LIMIT = {"max_new_tokens": 60, "return_dict_in_generate": True}


class Broken(BaseException):
    """Like KeyboardInterrupt no ``Exception``."""


def breaks(kind, call, result=None):
    """A function that gives ``result`` of its arguments, and raises at its ``call``-th call."""
    calls = count(1)

    def function(*args, **kwargs):
        if next(calls) == call:
            raise kind("broken on purpose")
        return None if result is None else result(*args)

    function.stateless = True  # it is not: the count of its calls is what the tests want of it
    return function


class Plain:
    """A streamer of transformers' kind that notes whether it was ended."""

    def __init__(self, put=None):
        self.put, self.ends = put or breaks(Broken, 0), 0

    def end(self):
        self.ends += 1


class Watcher(AparStreamer):
    def __init__(self, method=None, function=None):
        self.ends = 0
        if method is not None:
            setattr(self, method, function)

    def end(self):
        self.ends += 1


class Guesses(Proposer):
    """Guesses one token that is never right, and raises in ``method``."""

    schedule = "constant"

    def __init__(self, method, function):
        self.watches = method == "observe"
        setattr(self, method, function)

    def propose(self, rows, limits):
        return [[Draft([1])] * len(row.live) for row in rows]


@contextmanager
def forward_hook(model, function):
    handle = model.register_forward_pre_hook(lambda *args: function())
    try:
        yield
    finally:
        handle.remove()


def state(model):
    """All of a model that a run might change: its objects, its settings, its hooks, its attention."""
    hooks = [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    ]
    generation, config = copy.deepcopy(vars(model.generation_config)), copy.deepcopy(vars(model.config))
    return type(model), {name: id(value) for name, value in vars(model).items()}, hooks, generation, config


PLACES = {
    "processor": lambda broken: {"logits_processor": [broken(lambda ids, scores: scores)]},
    "allowed tokens": lambda broken: {"prefix_allowed_tokens_fn": broken(lambda row, ids: list(range(48)))},
    "criterion": lambda broken: {"stopping_criteria": [broken(lambda ids, scores: False)]},
    "streamer": lambda broken: {"streamer": Plain(broken())},
    "second streamer": lambda broken: {"streamer": [Watcher(), Plain(), Plain(broken())]},
    "begin_thread": lambda broken: {"streamer": [Plain(), Watcher("begin_thread", broken())]},
    "put_token": lambda broken: {"streamer": Watcher("put_token", broken())},
    "end_thread": lambda broken: {"streamer": Watcher("end_thread", broken())},
    "propose": lambda broken: {"proposer": Guesses("propose", broken(Guesses.propose_none))},
    "observe": lambda broken: {"proposer": Guesses("observe", broken())},
}
Guesses.propose_none = staticmethod(lambda rows, limits: [[Draft()] * len(row.live) for row in rows])


def drafts(kind):
    if kind == "lookup":
        return {"prompt_lookup_num_tokens": 3, "num_assistant_tokens_schedule": "constant"}
    if kind == "assistant":
        return {"assistant_model": tiny_llama(seed=5), "num_assistant_tokens_schedule": "constant"}
    if kind == "Medusa":
        torch.manual_seed(0)
        return {"proposer": MedusaDrafts(MedusaHeads(32, 16, torch.arange(CHILD), 2), schedule="constant")}
    return {}


def attempt(model, options, kind, **more):
    """Run ``model`` until something raises; whatever it was, all is as before."""
    models = [model, *([options["assistant_model"]] if "assistant_model" in options else [])]
    before = [state(one) for one in models]
    with pytest.raises(kind, match="broken on purpose"):
        model.generate(**ONE, **{"apar": True} | LIMIT | options | more)
    assert [state(one) for one in models] == before
    assert not attention._SWITCHED and attention._STEP.get() is None
    streamers = options.get("streamer", [])
    for streamer in streamers if isinstance(streamers, list) else [streamers]:
        assert streamer.ends == 1


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return enable_apar(tiny_llama(attn_implementation=request.param))


@pytest.fixture(scope="module")
def expected(model):
    out = model.generate(**ONE, apar=True, **LIMIT)
    assert len(out.trees[0].threads) > 4
    return out.sequences.tolist()


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("place", PLACES)
def test_l9_what_raises_in_a_callers_object_changes_nothing(model, expected, place, call):
    for kind in (RuntimeError, Broken):
        attempt(model, PLACES[place](lambda result=None, kind=kind: breaks(kind, call, result)), kind)
    assert model.generate(**ONE, apar=True, **LIMIT).sequences.tolist() == expected


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("speculation", ["none", "lookup", "assistant", "Medusa"])
def test_l9_what_raises_in_a_model_or_amid_drafts_changes_nothing(model, expected, speculation, call):
    """The model's own forward, the assistant's, and a criterion while drafts are out; then the same objects run on."""
    options = drafts(speculation)
    for kind in (RuntimeError, KeyboardInterrupt):
        with forward_hook(model, breaks(kind, call)):
            attempt(model, options, kind)
        attempt(model, options, kind, stopping_criteria=[breaks(kind, call, lambda ids, scores: False)])
        if speculation == "assistant":
            with forward_hook(options["assistant_model"], breaks(kind, call)):
                attempt(model, options, kind)
    assert model.generate(**ONE, apar=True, **LIMIT, **options).sequences.tolist() == expected


def test_l9_a_prefix_that_was_passed_in_is_left_as_it_was(model):
    cache = DynamicCache()
    model(input_ids=ONE["input_ids"][:, :2], past_key_values=cache)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    attempt(model, {"past_key_values": cache}, Broken, logits_processor=[breaks(Broken, 3, lambda ids, scores: scores)])
    for layer, (keys, values) in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


@pytest.mark.parametrize("bare", [False, True])
def test_l9_who_reads_an_iterator_streamer_does_not_wait_for_ever(model, bare):
    """Plain ``generate`` leaves its reader waiting; here the text so far comes, and then the end."""

    class Letters:
        def decode(self, ids, **kwargs):
            return "".join(f"{int(token)} " for token in ids)

    streamer, raised = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=60), []
    options = LIMIT | {"logits_processor": [breaks(RuntimeError, 9, lambda ids, scores: scores)]}

    def work():
        try:
            if bare:
                model.generate(**ONE, custom_generate=partial(apar_decode, streamer=streamer), **options)
            else:
                model.generate(**ONE, apar=True, streamer=streamer, **options)
        except Exception as error:
            raised.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert [str(error) for error in raised] == ["broken on purpose"] and len(text.split()) > 1


def test_l9_an_argument_that_is_refused_ends_the_streamers_too(model):
    for options in ({"num_beams": 2}, {"synced_gpus": True}, {"cache_implementation": "static"}):
        streamer = Plain()
        with pytest.raises(ConfigurationError):
            model.generate(**ONE, apar=True, streamer=streamer, **LIMIT, **options)
        assert streamer.ends == 1
    assert FORK in model.generation_config.suppress_tokens


# several runs of one process at once


def at_once(calls):
    """Run ``calls`` in a thread each; return what they give, in order."""
    got = [None] * len(calls)

    def work(index):
        got[index] = calls[index]()

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return got


def test_l9_models_that_share_a_configuration_decode_at_once_and_one_of_them_breaks():
    one = enable_apar(tiny_llama())
    other = LlamaForCausalLM(one.config).eval()
    other.load_state_dict(tiny_llama(seed=1).state_dict())
    other.generation_config = copy.deepcopy(one.generation_config)
    enable_apar(other)
    alone = [model.generate(**ONE, apar=True, **LIMIT).sequences.tolist() for model in (one, other)]
    plain = one.generate(**ONE, max_new_tokens=30).tolist()

    def broken():
        attempt_options = {"logits_processor": [breaks(RuntimeError, 4, lambda ids, scores: scores)]}
        with pytest.raises(RuntimeError, match="broken on purpose"):
            one.generate(**ONE, apar=True, **LIMIT, **attempt_options)

    calls = [
        lambda: one.generate(**ONE, apar=True, **LIMIT).sequences.tolist(),
        lambda: other.generate(**ONE, apar=True, **LIMIT).sequences.tolist(),
        broken,
        lambda: one.generate(**ONE, max_new_tokens=30).tolist(),
    ]
    for _ in range(3):
        assert at_once(calls * 2) == [*alone, None, plain] * 2
    assert one.config is other.config and one.config._attn_implementation == "sdpa" and not attention._SWITCHED


@pytest.mark.parametrize("speculation", ["lookup", "assistant"])
def test_one_assistant_serves_several_calls_at_once(model, speculation):
    options = LIMIT | drafts(speculation)
    prompts = [torch.tensor(random_prompts(1, seed)) for seed in (4, 6, 11, 34)]
    expected = [model.generate(ids, apar=True, **LIMIT).sequences.tolist() for ids in prompts]
    calls = [lambda ids=ids: model.generate(ids, apar=True, **options).sequences.tolist() for ids in prompts]
    for _ in range(3):
        assert at_once(calls) == expected
