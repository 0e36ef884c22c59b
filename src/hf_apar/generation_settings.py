"""Generation configs that can be saved, and in which a thread ends where it is taught to."""

import copy
import logging

from transformers import GenerationConfig, PreTrainedTokenizerBase

from hf_apar.errors import ConfigurationError

logger = logging.getLogger(__name__)

_MODES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")  # what other settings count under


def eos_token_ids(generation_config: GenerationConfig) -> list[int]:
    """Return the ids that end a thread, the preferred one first."""
    eos = generation_config.eos_token_id
    return [] if eos is None else [int(token) for token in (eos if isinstance(eos, list | tuple) else [eos])]


def padding_token(generation_config: GenerationConfig) -> int:
    """Return the id that fills up shorter rows, whatever it is where none is set."""
    pad = generation_config.pad_token_id
    return int(next(iter(eos_token_ids(generation_config)), 0) if pad is None else pad)


def make_savable(config: GenerationConfig) -> list[str]:
    """Change what keeps ``config`` from being saved, and return in words what was changed.

    transformers saves no config with a setting that its mode leaves unused, once anything else in it was changed: published
    ones hold such settings all the same. Settings for sampling in a config that says nothing of ``do_sample`` were meant to
    be used, so it samples from now on, unless one of them is 0; any other unused setting is taken out.

    Raises:
        ConfigurationError: if it cannot be saved for another reason.

    >>> config = GenerationConfig(top_p=0.6)
    >>> make_savable(config), config.do_sample, config.top_p
    (['do_sample=True was added, since top_p is set'], True, 0.6)
    """
    if not (error := _refusal(config)):
        return []
    unused, changes = _unused(config), []
    if config.do_sample is None:
        sampling = copy.copy(config)
        sampling.do_sample = True
        used = [name for name in unused if name not in _unused(sampling)]
        # a temperature of 0 asks for the likeliest token, and penalty_alpha for another search
        if used and all(getattr(config, name) for name in used) and not config.penalty_alpha:
            config.do_sample = True
            changes.append(f"do_sample=True was added, since {' and '.join(used)} {'is' if len(used) == 1 else 'are'} set")
    for name in _unused(config):
        changes.append(f"{name}={getattr(config, name)!r}, of no use without other settings, was taken out")
        setattr(config, name, None)
    if error := _refusal(config):
        raise ConfigurationError(
            f"the model's generation config cannot be saved, correct it first: {' '.join(error.split())}"
        )
    return changes


def _refusal(config: GenerationConfig) -> str:
    """Return why transformers would not save ``config``, "" if it would."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return ""


def _unused(config: GenerationConfig) -> list[str]:
    """Return the settings that are refused even alone, in the modes of ``config``."""
    found = []
    for name, value in config.to_diff_dict().items():
        probe = GenerationConfig()
        for mode in _MODES:
            setattr(probe, mode, getattr(config, mode))
        if name in _MODES or not hasattr(probe, name):
            continue
        setattr(probe, name, value)
        if _refusal(probe):
            found.append(name)
    return found


def end_as_taught(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """See to it that decoding stops at the tokenizer's EOS, the last target of a thread.

    Where the config does not know it, it gets it; where the tokenizer has none, it gets the config's first.
    """
    ids = eos_token_ids(config)
    if tokenizer.eos_token_id is None and ids:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])
        logger.warning("the tokenizer has no EOS; it gets the generation config's, %s", tokenizer.eos_token)
    elif tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        config.eos_token_id = [*ids, int(tokenizer.eos_token_id)]
        logger.warning(
            "the tokenizer ends with %s (id %d), which the generation config does not know; threads are taught to end with "
            "it, so it is added there: eos_token_id=%s",
            tokenizer.eos_token, tokenizer.eos_token_id, config.eos_token_id,
        )  # fmt: skip
