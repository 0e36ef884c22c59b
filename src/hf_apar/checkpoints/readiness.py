"""All that can be known of a model and its tokenizer before anything is written or trained, asked at once."""

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.checks import learns_prompts, validate_layers
from hf_apar.errors import AparError, UnsupportedModelError
from hf_apar.generation_settings import eos_token_ids, make_savable
from hf_apar.text.chat import encode_chat
from hf_apar.tokens import checkpoint_config, embedding_rows, known_settings

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

_PROBE = [{"role": "user", "content": "Hello"}]


def check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool = True,
    token_rows: bool = True,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> None:
    """Raise one error that lists all that keeps ``model`` from being taught to fork, or from forking afterwards.

    Neither argument is changed. Call it before hours are spent; ``hf-apar distill``, ``elaborate``, ``train``,
    ``train-medusa`` and ``recipe`` do. What :func:`~hf_apar.add_control_tokens` sees to by itself is no problem: missing
    control tokens, too few rows for them, an EOS that the generation config lacks, a generation config that would not save.

    Args:
        model: any causal LM, with or without control tokens, a PEFT model's base or the PEFT model.
        chat: prompts are put in the tokenizer's chat template.
        token_rows: the rows of the control tokens are trained alone, as with LoRA; ``False`` for a model that only writes,
            or whose layers are trained whole.
        chat_template_kwargs: as for :func:`~hf_apar.encode_chat`.

    Raises:
        UnsupportedModelError: one sentence or two for each problem, with the way out.
    """
    base = _without_adapter(model)
    problems = [
        *_layers(model, base), *_rows(base, token_rows), *_generation(base), *_vocabulary(base, tokenizer),
        *_control_tokens(base, tokenizer), *(_chat(base, tokenizer, chat_template_kwargs) if chat else ()),
    ]  # fmt: skip
    if len(problems) == 1:
        raise UnsupportedModelError(problems[0])
    if problems:
        listed = "\n".join(f"({number}) {problem}" for number, problem in enumerate(problems, start=1))
        raise UnsupportedModelError(f"{len(problems)} things keep {type(base).__name__} from learning to fork:\n{listed}")


def _without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    base = cast("PeftModel", model).get_base_model() if hasattr(model, "get_base_model") else model
    assert isinstance(base, PreTrainedModel)
    return base


def _layers(model: PreTrainedModel, base: PreTrainedModel) -> Iterator[str]:
    try:
        validate_layers(model if learns_prompts(model) else base)
    except UnsupportedModelError as error:
        yield str(error)


def _rows(model: PreTrainedModel, alone: bool) -> Iterator[str]:
    """Can the rows of new tokens be trained, in the embeddings and in the output layer?"""
    name = type(model).__name__
    for layer, role in ((model.get_input_embeddings(), "embeddings"), (model.get_output_embeddings(), "output layer")):
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, torch.Tensor):
            yield f"{name} has no {role} with a weight; APAR needs a causal language model"
        elif alone and (not weight.is_floating_point() or weight.dim() != 2):
            yield (
                f"the {role} of {name} are packed ({type(layer).__name__}, {weight.dtype}), so that [Fork] and [Child] have "
                "no rows to train; keep them out of quantisation (llm_int8_skip_modules, modules_to_not_convert), or load a "
                "GGUF file with quantization_config=GgufConfig(gguf_file=..., dequantize=True)"
            )
        elif alone and getattr(layer, "bias", None) is not None:
            yield (
                f"the {role} of {name} has a bias, which PEFT leaves out while it trains single rows; train all weights, or "
                "the whole layer with modules_to_save, and call check_model(..., token_rows=False)"
            )


def _generation(model: PreTrainedModel) -> Iterator[str]:
    if model.generation_config is None:
        yield f"{type(model).__name__} has no generation config; APAR needs a model that can generate"
        return
    try:
        make_savable(copy.deepcopy(model.generation_config))
    except AparError as error:
        yield str(error)


def _vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Does the tokenizer give ids that the model has rows for, and one that ends a thread?"""
    ends = [] if model.generation_config is None else eos_token_ids(model.generation_config)
    if tokenizer.eos_token_id is None and not (ends and tokenizer.convert_ids_to_tokens(ends[0])):
        yield (
            "neither the tokenizer nor the generation config has an EOS, so that no thread could end; set "
            "tokenizer.eos_token to the token that ends the model's answers"
        )
    rows = embedding_rows(model)
    for role, token in (("EOS", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if token is not None and token >= rows:
            yield (
                f"the tokenizer's {role} has the id {token}, the model has {rows} rows; load the model's own tokenizer, or "
                "call model.resize_token_embeddings(len(tokenizer)) first"
            )
    if len(tokenizer) > rows:
        logger.warning("the tokenizer has %d tokens, the model %d rows: some mean nothing to it", len(tokenizer), rows)


def _control_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Where the model has control tokens: are they the tokenizer's, and will what is learnt stop?"""
    settings, found = checkpoint_config(model), known_settings(tokenizer)
    given, known = settings.control_ids, found.control_ids
    if given is None or model.generation_config is None:
        return
    if known is not None and known != given:
        yield (
            f"the checkpoint's [Fork] and [Child] have the ids {given}, the tokenizer's {known}; load the tokenizer of the "
            "checkpoint's own folder"
        )
    if (highest := max(given)) >= (rows := embedding_rows(model)):
        yield f"a control token has the id {highest}, the model has {rows} rows; call add_control_tokens(model, tokenizer)"
    ends = eos_token_ids(model.generation_config)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        yield (
            f"the tokenizer ends with {tokenizer.eos_token} (id {tokenizer.eos_token_id}), the generation config with "
            f"{ends}, so that no thread would end; call add_control_tokens(model, tokenizer), which adds it there"
        )


def _chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, object] | None
) -> Iterator[str]:
    if not getattr(tokenizer, "chat_template", None) and "chat_template" not in (chat_template_kwargs or {}):
        yield (
            "the tokenizer has no chat template, so that no prompt can be put to the model; set tokenizer.chat_template to "
            "the format that the model was tuned with and save it beside the model (chat_template.jinja)"
        )
        return
    try:
        ids = encode_chat(tokenizer, _PROBE, chat_template_kwargs=chat_template_kwargs)
    except Exception as error:  # a template is a program of its own
        yield f"the tokenizer's chat template fails on a user's message ({' '.join(str(error).split())}); correct it first"
        return
    if not ids:
        yield "the tokenizer's chat template makes no tokens of a user's message; correct it first"
    elif max(ids) >= (rows := embedding_rows(model)):
        token = tokenizer.convert_ids_to_tokens(max(ids))
        yield (
            f"the tokenizer's chat template gives the id {max(ids)} ({token}), the model has {rows} rows; load the model's "
            "own tokenizer, or one without tokens that the model was never taught"
        )
