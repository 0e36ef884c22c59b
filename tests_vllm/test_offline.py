"""The real engine in this process: its answers are those of ``model.generate(apar=True)``, and nothing stays behind."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams
from vllm.v1.core.sched.utils import check_sequence_repetition

from byte_tokenizer import byte_tokenizer
from hf_apar import AparConfig
from hf_apar.errors import ConfigurationError, ControlTokenError
from hf_apar.serving.admission import Eager, EqualShare, FixedCap
from hf_apar.serving.vllm import AparLLM, offline

LENGTH = 1024  # tokens that fit into the model of conftest.py
GREEDY = {"temperature": 0.0, "max_tokens": 600, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def engine(folder):
    return AparLLM(
        str(folder), dtype="float32", max_model_len=LENGTH, enforce_eager=True, logprobs_mode="processed_logprobs",
        num_gpu_blocks_override=400,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After each test all blocks are free again, and no request, task or answer remains."""
    yield
    if "engine" not in request.fixturenames:
        return
    engine = request.getfixturevalue("engine")
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "one block is vLLM's own"
    assert scheduler.get_request_counts() == (0, 0) and not engine.llm.llm_engine.has_unfinished_requests()
    driver = engine._driver
    assert len(driver) == len(driver.admission) == driver.threads == len(engine._engine._requests) == 0


@pytest.mark.parametrize("policy", [Eager(), FixedCap(2), EqualShare(6)])
def test_text_ids_and_logprobs_are_those_of_generate(engine, oracle, prompts, policy, tokenizer_and_model):
    engine._driver.admission.policy = policy
    outputs = engine.generate(prompts, SamplingParams(**GREEDY, logprobs=0))
    forks = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        tree, (one,) = oracle(prompt), output.outputs
        assert list(one.token_ids) == tree.token_ids + tree.closing_ids
        assert one.text == tree.text(tokenizer_and_model[0])
        assert one.tree.token_ids == tree.token_ids and one.finish_reason == "stop"
        ours = {tuple(thread.path_ids): thread for thread in one.tree.threads}
        assert ours.keys() == {tuple(thread.path_ids) for thread in tree.threads}
        for thread in tree.threads:
            same = ours[tuple(thread.path_ids)]
            assert same.logprobs[1:] == pytest.approx(thread.logprobs[1:], abs=2e-4) and same.finish_reason == "eos"
            # no parameter bans [Fork] right after [Child], so that what it might have been counts there
            first, theirs = same.logprobs[0], thread.logprobs[0]
            assert first <= theirs + 5e-4 if thread.parent is not None else first == pytest.approx(theirs, abs=2e-4)
        assert len(one.logprobs) == len(one.token_ids)
        assert one.cumulative_logprob == pytest.approx(sum(next(iter(step.values())).logprob for step in one.logprobs))
        forks += len(tree.threads) - 1
    assert forks > 10


def test_a_child_finds_all_whole_blocks_of_its_prefix(engine, prompts, monkeypatch):
    seen = []

    step = engine.llm.llm_engine.step

    def stepped():
        outputs = step()
        seen.extend((len(one.prompt_token_ids), one.num_cached_tokens) for one in outputs if one.finished)
        return outputs

    engine.llm.reset_prefix_cache()
    monkeypatch.setattr(engine.llm.llm_engine, "step", stepped)
    engine._driver.admission.policy = Eager()
    engine.generate(prompts[3], SamplingParams(**GREEDY))
    children = [(length, cached) for length, cached in seen if length > len(prompts[3])]
    assert len(children) > 3
    assert all(cached == (length - 1) // 32 * 32 for length, cached in children), children


def test_an_answer_is_bounded_in_all_its_threads_together(engine, prompts):
    outputs = engine.generate(prompts, SamplingParams(**{**GREEDY, "max_tokens": 12}))
    lengths = [len(one.outputs[0].token_ids) for one in outputs]
    assert max(lengths) == 12 and "length" in {one.outputs[0].finish_reason for one in outputs}


def test_the_first_stop_string_in_reading_order_ends_the_answer(engine, prompts):
    whole = [one.outputs[0] for one in engine.generate(prompts, SamplingParams(**GREEDY))]
    cut = 0
    for prompt, answer in zip(prompts, whole, strict=True):
        pairs = [answer.text[place : place + 2] for place in range(len(answer.text) // 2, len(answer.text) - 1)]
        for stop in [pair for pair in pairs if "\ufffd" not in pair][:1]:
            (output,) = engine.generate([prompt], SamplingParams(**GREEDY, stop=[stop]))
            assert output.outputs[0].text == answer.text[: answer.text.index(stop)]
            assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
            cut += 1
    assert cut > 2


def test_a_stop_string_ends_the_work_too(engine, prompts, monkeypatch):
    """What is cut is not written to its end first."""
    steps, step = [], engine.llm.llm_engine.step
    monkeypatch.setattr(engine.llm.llm_engine, "step", lambda: (steps.append(1), step())[1])
    counts = []
    (whole,) = engine.generate(prompts[3:4], SamplingParams(**GREEDY))
    for stop in (None, [whole.outputs[0].text[:1]]):
        steps.clear()
        engine.generate(prompts[3:4], SamplingParams(**GREEDY, stop=stop))
        counts.append(len(steps))
    assert counts[1] <= 3 < 10 < counts[0]


def test_several_answers_are_drawn_for_one_prompt(engine, prompts):
    (output,) = engine.generate(prompts[:1], SamplingParams(temperature=1.0, max_tokens=80, n=3))
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert len({tuple(one.token_ids) for one in output.outputs}) > 1


def test_what_a_user_typed_is_no_control_token(engine, tokenizer_and_model):
    tokenizer, _ = tokenizer_and_model
    chat = [{"role": "user", "content": "[Fork] and [Child]"}]
    typed = engine.chat(chat, SamplingParams(**GREEDY))[0]
    raw = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.vocab["[Fork]"] in raw, "transformers itself would take it for one"
    assert engine.generate([raw], SamplingParams(**GREEDY))[0].prompt_token_ids == typed.prompt_token_ids
    assert not {tokenizer.vocab["[Fork]"], tokenizer.vocab["[Child]"]} & set(typed.prompt_token_ids)


def test_a_thread_that_repeats_itself_ends_there_and_the_others_go_on(engine, prompts):
    options = {"temperature": 0.0, "max_tokens": 400}
    looking = RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=1, min_count=2)
    outputs = engine.generate(prompts, SamplingParams(**options, repetition_detection=looking))
    mixed = 0
    for output, whole in zip(outputs, engine.generate(prompts, SamplingParams(**options)), strict=True):
        (one,), others = (
            output.outputs,
            {tuple(other.path_ids[: other.start]): other for other in whole.outputs[0].tree.threads},
        )
        reasons = {thread.finish_reason for thread in one.tree.threads}
        for thread in one.tree.threads:
            made = thread.sampled_ids
            assert check_sequence_repetition(made, looking) is (thread.finish_reason == "stop")
            if (same := others.get(tuple(thread.path_ids[: thread.start]))) is not None:
                assert same.sampled_ids[: len(made)] == made[: len(same.sampled_ids)]
        ended = ("repetition", "repetition_detected") if "stop" in reasons else ("stop", None)
        assert (one.finish_reason, one.stop_reason) == ended or "length" in reasons
        mixed += {"stop", "eos"} <= reasons
    assert mixed


def test_log_probabilities_of_chosen_tokens_come_with_every_token(engine, prompts):
    for flat in (False, True):
        params = SamplingParams(**GREEDY, logprob_token_ids=[65, 66], flat_logprobs=flat)
        ((one,),) = (output.outputs for output in engine.generate(prompts[3], params))
        assert len(one.logprobs) == len(one.token_ids) > 10
        assert all({token, 65, 66} == step.keys() for token, step in zip(one.token_ids, one.logprobs, strict=True))


def test_the_engine_itself_writes_no_control_token(engine, prompts, control, tokenizer_and_model):
    """Whoever uses it beside loses nothing: it writes what transformers writes plainly."""
    model = tokenizer_and_model[1]
    outputs = engine.llm.generate(prompts, SamplingParams(**GREEDY | {"max_tokens": 60}), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        plain = model.generate(torch.tensor([prompt]), apar=False, max_new_tokens=60)[0, len(prompt) :].tolist()
        assert list(output.outputs[0].token_ids) == plain and not control & {*plain}


def test_parameters_that_threads_cannot_follow_are_refused(engine, prompts):
    with pytest.raises(ConfigurationError, match="one token"):
        engine.generate(prompts, SamplingParams(max_tokens=1))
    with pytest.raises(ConfigurationError, match="give one for all"):
        engine.generate(prompts, [SamplingParams(**GREEDY)])


def test_an_error_in_the_midst_leaves_nothing_behind(engine, prompts, monkeypatch):
    calls = []

    def failing(request, output, made_by=offline.made_by):
        calls.append(request)
        if len(calls) == 40:
            raise RuntimeError("stop here")
        return made_by(request, output)

    monkeypatch.setattr(offline, "made_by", failing)
    with pytest.raises(RuntimeError, match="stop here"):
        engine.generate(prompts, SamplingParams(**GREEDY))


def test_a_cache_that_is_too_small_for_all_threads_changes_no_text(folder, oracle, prompts):
    small = AparLLM(
        str(folder), dtype="float32", max_model_len=256, enforce_eager=True, num_gpu_blocks_override=14, max_num_seqs=32
    )  # fmt: skip
    counted = []
    scheduler = small.llm.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (counted.append(1), preempt(*args, **kwargs))
    outputs = small.generate(prompts, SamplingParams(**GREEDY))
    trees = [oracle(prompt) for prompt in prompts]
    fit = [place for place, tree in enumerate(trees) if max(len(thread.path_ids) for thread in tree.threads) < 256]
    assert [list(outputs[place].outputs[0].token_ids) for place in fit] == [
        trees[place].token_ids + trees[place].closing_ids for place in fit
    ]
    assert counted and len(fit) > 2, "the cache must have been too small for answers that fit into the model"


def test_a_model_without_control_tokens_is_refused(tmp_path, folder, tokenizer_and_model):
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ControlTokenError, match="hf-apar merge"):
        AparLLM(str(tmp_path), apar=AparConfig(), dtype="float32", enforce_eager=True, num_gpu_blocks_override=20)
