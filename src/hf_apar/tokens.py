"""The control tokens [Fork] and [Child]: how a model gets them, and how a checkpoint tells its ids."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.config import MAX_THREADS, AparConfig
from hf_apar.errors import ConfigurationError, ControlTokenError
from hf_apar.generation_settings import end_as_taught, eos_token_ids, make_savable
from hf_apar.protocol import ControlTokens, ForkProtocol

logger = logging.getLogger(__name__)

FORK_TOKEN = "[Fork]"
CHILD_TOKEN = "[Child]"


@dataclass(frozen=True)
class ControlPair:
    """Names of the two control tokens.

    Attributes:
        joint: put between segments of an answer where neither has a space; what models of these tokens learnt without it.
    """

    fork: str
    child: str
    joint: str = ""


KNOWN_PAIRS = (
    ControlPair(FORK_TOKEN, CHILD_TOKEN),
    # the paper's own checkpoints: the line breaks before titles and details were cut off of what they learnt from
    ControlPair("[SplitMask]", "[SplitSop]", joint="\n"),
    ControlPair("<FORK>", "<CHILD>"),
)
"""Control tokens that are found by themselves, ours first."""


def add_control_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, names: tuple[str, str] | None = None
) -> tuple[int, int]:
    """Give ``model`` and ``tokenizer`` the tokens [Fork] and [Child], before fine-tuning; a second call changes nothing.

    Tokens that are there already are taken: those of the checkpoint's settings, or a pair of :data:`KNOWN_PAIRS`. The
    vocabulary grows if it has to and never shrinks. A new row of the embeddings, and of the output layer where it is
    not tied to them, is the mean of the rows of the token's own word pieces. The ids, and their suppression in plain
    decoding, are written into ``model.generation_config``, so that they travel with the checkpoint. There the tokenizer's
    EOS, with which threads are taught to end, is added if it is missing, and a config that transformers would not save is
    corrected (:func:`~hf_apar.generation_settings.make_savable`); a warning tells of either.

    Args:
        names: of [Fork] and [Child], in place of those that are found or ours.

    Returns:
        The ids of [Fork] and [Child].

    Raises:
        ControlTokenError: if the model's embeddings cannot be resized, or ``names`` are no two names.
    """
    pair = _pair_for(model, tokenizer, names)
    rows, known = embedding_rows(model), tokenizer.get_vocab()
    fresh = [name for name in (pair.fork, pair.child) if known.get(name, rows) >= rows]
    pieces = {name: _pieces(tokenizer, name) for name in fresh}
    tokenizer.add_tokens([name for name in fresh if name not in known], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    fork, child = vocabulary[pair.fork], vocabulary[pair.child]
    if strangers := sorted(name for name, token in known.items() if token >= rows and name not in fresh):
        logger.warning("the model has no embeddings of %s, tokens of its tokenizer; it gets random ones", strangers[:8])
    _grow_embeddings(model, max(len(tokenizer), fork + 1, child + 1))
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(layer.weight): cast(torch.Tensor, layer.weight) for layer in both if layer is not None}
    with torch.no_grad():
        for weight in weights.values():  # one where input and output are tied
            for name in fresh:
                own = [piece for piece in pieces[name] if piece < rows]
                weight[vocabulary[name]] = weight[own or slice(rows)].mean(dim=0)
    _record(model, tokenizer, AparConfig(fork_token_id=fork, child_token_id=child, joint=pair.joint or None))
    return fork, child


def _pair_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: tuple[str, str] | None) -> ControlPair:
    if names is not None:
        if len(names) != 2 or names[0] == names[1] or not all(names):
            raise ControlTokenError(f"names is {names!r}; give two different names, such as {(FORK_TOKEN, CHILD_TOKEN)}")
        return next((pair for pair in KNOWN_PAIRS if (pair.fork, pair.child) == tuple(names)), ControlPair(*names))
    settings, added = checkpoint_config(model), tokenizer.added_tokens_decoder
    if settings.fork_token_id in added and settings.child_token_id in added:
        own = added[settings.fork_token_id].content, added[settings.child_token_id].content
        return _pair_for(model, tokenizer, own)
    return known_pair(tokenizer) or KNOWN_PAIRS[0]


def _pieces(tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Return the tokens that spell ``name``, which may be a token already."""
    parts = (name[:1], name[1:]) if name in tokenizer.get_vocab() else (name,)
    return [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]


def known_pair(tokenizer: PreTrainedTokenizerBase) -> ControlPair | None:
    """Return the first of :data:`KNOWN_PAIRS` both of whose tokens ``tokenizer`` has."""
    vocabulary = tokenizer.get_vocab()
    return next((pair for pair in KNOWN_PAIRS if pair.fork in vocabulary and pair.child in vocabulary), None)


def known_settings(tokenizer: PreTrainedTokenizerBase) -> AparConfig:
    """Return the ids of a known pair of control tokens and what goes with them; nothing where ``tokenizer`` has none."""
    pair = known_pair(tokenizer)
    if pair is None:
        return AparConfig()
    vocabulary = tokenizer.get_vocab()
    return AparConfig(fork_token_id=vocabulary[pair.fork], child_token_id=vocabulary[pair.child], joint=pair.joint or None)


def completed(settings: AparConfig, tokenizer: PreTrainedTokenizerBase | None) -> AparConfig:
    """Return ``settings`` with what they leave open of the control tokens taken from ``tokenizer``.

    Where they name other tokens than the pair that it has, they stay as they are.
    """
    known = AparConfig() if tokenizer is None else known_settings(tokenizer)
    named = ((settings.fork_token_id, known.fork_token_id), (settings.child_token_id, known.child_token_id))
    return settings if any(own not in (None, found) for own, found in named) else settings.filled_from(known)


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


def _record(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, found: AparConfig) -> None:
    generation = model.generation_config
    if generation is None:
        raise ControlTokenError(f"{type(model).__name__} has no generation config; APAR needs a model that can generate")
    settings = dict(getattr(generation, "apar_config", None) or {})
    ids = {"fork_token_id": found.fork_token_id, "child_token_id": found.child_token_id}
    record_settings(model, {**found.to_dict(), **settings, **ids})
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *ids.values()})
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
    return saved_settings(model.generation_config)


def control_ids_of(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids of the control tokens that ``model``'s generation config carries: both, or none."""
    return frozenset(checkpoint_config(model).control_ids or ())


def saved_settings(generation_config: GenerationConfig | None) -> AparConfig:
    """Return the APAR settings that a generation config carries; the defaults where it carries none."""
    return AparConfig.from_dict(getattr(generation_config, "apar_config", None) or {})


def fork_rules(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    given: AparConfig | None = None,
    protocol: ForkProtocol | None = None,
) -> tuple[ForkProtocol, int]:
    """Return who forks in a call of ``generate``, and how many threads of a row may live at once.

    That is ``protocol``, or else the control tokens of ``given``, with what it leaves open taken from the checkpoint.

    Raises:
        ControlTokenError: if the ids are unknown or outside the vocabulary.
        ConfigurationError: if ``protocol`` is none, or ``given`` sets what is the protocol's business.
    """
    config = (given or AparConfig()).filled_from(saved_settings(generation_config))
    if protocol is None:
        if config.control_ids is None:
            raise ControlTokenError(_missing(model))
        validate_control_ids(config, model)
        protocol = ControlTokens.of(config, eos_token_ids(generation_config))
    else:
        _validate_protocol(protocol, given or AparConfig(), embedding_rows(model))
    return protocol, config.max_threads or MAX_THREADS


def _validate_protocol(protocol: object, given: AparConfig, rows: int) -> None:
    if not isinstance(protocol, ForkProtocol):
        raise ConfigurationError(f"protocol is {protocol!r}; pass an object of a subclass of ForkProtocol")
    if strange := sorted(token for token in {*protocol.control_ids, *protocol.bias} if not 0 <= token < rows):
        name = type(protocol).__name__
        raise ConfigurationError(f"{name} names the token {strange[0]}, and the model knows {rows} tokens")
    if unused := sorted(given.to_dict().keys() - {"max_threads"}):
        raise ConfigurationError(
            f"{', '.join(unused)} of apar belong to the control tokens, whose place {type(protocol).__name__} takes; leave "
            "them out, or the protocol"
        )


def validate_control_ids(config: AparConfig, model: PreTrainedModel) -> None:
    """Raise :class:`ControlTokenError` for ids of [Fork] and [Child] that the model has no rows for."""
    size = embedding_rows(model)
    highest = max(config.fork_token_id or 0, config.child_token_id or 0)
    if highest >= size:
        raise ControlTokenError(
            f"control token id {highest} is outside the vocabulary of {type(model).__name__}, {size} tokens; call "
            "add_control_tokens(model, tokenizer) on the base before its adapter is loaded"
        )


def find_control_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, int]:
    """Return the ids of [Fork] and [Child], from the checkpoint's settings or else from ``tokenizer``.

    There a pair of :data:`KNOWN_PAIRS` is found; tokens of other names stand in the settings.

    Raises:
        ControlTokenError: if neither knows them.
    """
    ids = completed(checkpoint_config(model), tokenizer).control_ids
    if ids is None:
        raise ControlTokenError(_missing(model))
    return ids


def _missing(model: PreTrainedModel) -> str:
    return (
        f"{type(model).__name__} has no {FORK_TOKEN} and {CHILD_TOKEN} tokens; call add_control_tokens(model, tokenizer) "
        "before fine-tuning, or load a checkpoint that was fine-tuned for APAR"
    )
