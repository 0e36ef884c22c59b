"""The control tokens [Fork] and [Child]: how a model gets them, and how a checkpoint tells its ids."""

import logging
from collections.abc import Mapping
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.config import AparConfig
from hf_apar.errors import ControlTokenError
from hf_apar.generation_settings import end_as_taught, make_savable

logger = logging.getLogger(__name__)

FORK_TOKEN = "[Fork]"
CHILD_TOKEN = "[Child]"


def add_control_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Give ``model`` and ``tokenizer`` the tokens [Fork] and [Child], before fine-tuning; a second call changes nothing.

    The vocabulary grows if it has to and never shrinks. A new row of the embeddings, and of the output layer where it is
    not tied to them, is the mean of the rows of the token's own word pieces. The ids, and their suppression in plain
    decoding, are written into ``model.generation_config``, so that they travel with the checkpoint. There the tokenizer's
    EOS, with which threads are taught to end, is added if it is missing, and a config that transformers would not save is
    corrected (:func:`~hf_apar.generation_settings.make_savable`); a warning tells of either.

    Returns:
        The ids of [Fork] and [Child].

    Raises:
        ControlTokenError: if the model's embeddings cannot be resized.
    """
    known = tokenizer.get_vocab()
    new = [token for token in (FORK_TOKEN, CHILD_TOKEN) if token not in known]
    pieces = {token: tokenizer.encode(token, add_special_tokens=False) for token in new}
    tokenizer.add_tokens(new, special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    fork, child = vocabulary[FORK_TOKEN], vocabulary[CHILD_TOKEN]
    _grow_embeddings(model, max(len(tokenizer), fork + 1, child + 1))
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(layer.weight): cast(torch.Tensor, layer.weight) for layer in both if layer is not None}
    with torch.no_grad():
        for weight in weights.values():  # one where input and output are tied
            for token in new:
                weight[vocabulary[token]] = weight[pieces[token]].mean(dim=0)
    _record(model, tokenizer, fork, child)
    return fork, child


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the size of the model's vocabulary, which may be padded beyond the tokenizer's."""
    return cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]


def _grow_embeddings(model: PreTrainedModel, size: int) -> None:
    if size <= embedding_rows(model):
        return  # a vocabulary padded to a round number has room already; resizing to len(tokenizer) would shrink it
    try:
        model.resize_token_embeddings(size, mean_resizing=False)
    except (ValueError, NotImplementedError) as error:
        raise ControlTokenError(
            f"the embeddings of {type(model).__name__} cannot be resized to {size} rows ({error}); add the control "
            "tokens to the unquantised model and save it first"
        ) from error


def _record(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fork: int, child: int) -> None:
    generation = model.generation_config
    if generation is None:
        raise ControlTokenError(f"{type(model).__name__} has no generation config; APAR needs a model that can generate")
    settings = dict(getattr(generation, "apar_config", None) or {})
    record_settings(model, settings | {"fork_token_id": fork, "child_token_id": child})
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), fork, child})
    end_as_taught(generation, tokenizer)
    for change in make_savable(generation):
        logger.warning("the generation config as it was could not be saved any more: %s", change)


def record_settings(model: PreTrainedModel, settings: Mapping[str, object]) -> None:
    """Write APAR ``settings`` into ``model``'s generation config, as a plain ``dict`` that is saved with it."""
    assert model.generation_config is not None
    model.generation_config.apar_config = dict(settings)  # type: ignore[attr-defined]
    # True for a model that had no generation config of its own, whose extra fields are then dropped when it is loaded
    model.generation_config._from_model_config = False


def checkpoint_config(model: PreTrainedModel) -> AparConfig:
    """Return the APAR settings that ``model``'s generation config carries; the defaults where it carries none."""
    return AparConfig.from_dict(getattr(model.generation_config, "apar_config", None) or {})


def find_control_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, int]:
    """Return the ids of [Fork] and [Child], from the checkpoint's settings or else from ``tokenizer``.

    Raises:
        ControlTokenError: if neither knows them.
    """
    settings = checkpoint_config(model)
    fork, child = settings.fork_token_id, settings.child_token_id
    if (fork is None or child is None) and tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        fork, child = vocabulary.get(FORK_TOKEN), vocabulary.get(CHILD_TOKEN)
    if fork is None or child is None:
        raise ControlTokenError(
            f"{type(model).__name__} has no {FORK_TOKEN} and {CHILD_TOKEN} tokens; call add_control_tokens(model, "
            "tokenizer) before fine-tuning, or load a checkpoint that was fine-tuned for APAR"
        )
    return fork, child
