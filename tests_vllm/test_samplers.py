"""What distilling samples with: on the most probable token alone, vLLM writes what transformers writes."""

import copy
import gc

import pytest
from vllm import LLM

from hf_apar.checkpoints.loading import load_base
from hf_apar.data.distillation import samplers
from hf_apar.data.distillation.samplers import Continuation, Task, TransformersSampler, VllmSampler

OPTIONS = {"temperature": 0.0, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def engines(plain_folder):
    model, tokenizer = load_base(plain_folder)
    gc.collect()  # an engine that another test is done with takes vLLM's process groups with it when it goes
    llm = LLM(str(plain_folder), dtype="float32", max_model_len=1024, enforce_eager=True, num_gpu_blocks_override=400)
    return VllmSampler(llm, tokenizer, **OPTIONS), TransformersSampler(model, tokenizer, straggler_share=0.0, **OPTIONS)


def same_from(engines, tasks):
    """Bytes at the end that are no letter yet are withheld by the one and shown as a mark by the other."""
    ours, theirs = ([Continuation(one.text.rstrip("\ufffd"), one.ended) for one in sample(tasks)] for sample in engines)
    assert ours == theirs
    return ours


def test_both_engines_write_the_same(engines, prompts):
    free = engines[1]([Task(prompt, 80) for prompt in prompts])
    letter = next(letter for letter in max((one.text for one in free), key=len)[10:] if letter.isascii())
    found = same_from(engines, [Task(prompt, 80, stop) for prompt in prompts for stop in ("", letter)])
    assert found[::2] != found[1::2], "the stop must cut some"


@pytest.mark.parametrize("least", [1, 8, 20])
def test_both_engines_end_with_the_same_sentence(engines, prompts, monkeypatch, least):
    """A random model hardly writes a full stop, so letters that it does write take its place."""
    lines = engines[1]([Task(prompt, 60, sentence_after=59) for prompt in prompts])
    marks = tuple({letter for one in lines for letter in one.text[least + 2 : least + 6] if letter != "\ufffd"})
    monkeypatch.setattr(samplers, "SENTENCE_ENDS", marks)
    found = same_from(engines, [Task(prompt, 60, sentence_after=least) for prompt in prompts])
    assert any(one.ended for one in found)
    for line, one in zip(lines, found, strict=True):
        assert line.text.startswith(one.text) and len(one.text) >= min(least / 4, 60 / 4)  # a letter has four bytes at most
        assert one.text.endswith(marks) is one.ended


def test_a_prompt_that_fills_the_context_counts_as_cut_off(engines, prompts):
    ours, _ = engines
    long, short = Task(prompts[0][:1] * 1024, 8), Task(prompts[0], 8)
    assert ours([long, short, long]) == [Continuation("", False), *ours([short]), Continuation("", False)]
    assert ours([long]) == [Continuation("", False)]


def test_a_tokenizer_may_have_more_tokens_than_the_model_has_rows(engines, prompts):
    ours, _ = engines
    larger = copy.deepcopy(ours.tokenizer)
    larger.add_special_tokens({"unk_token": "<image>"})
    task = Task(prompts[0], 24, sentence_after=8)
    assert VllmSampler(ours.llm, larger, **OPTIONS)([task]) == ours([task])
