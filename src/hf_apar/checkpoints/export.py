"""Forms in which APAR travels without this package's API: a ``custom_generate`` repository, and merged checkpoints."""

import copy
import logging
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.checkpoints.plain import forget_tokens, rows_without, weights_with
from hf_apar.errors import ConfigurationError
from hf_apar.generation_settings import make_savable
from hf_apar.text.encoding import token_name
from hf_apar.tokens import find_control_tokens

logger = logging.getLogger(__name__)

_GENERATE = Path(__file__).parent / "custom_generate" / "generate.py"

_CARD = """---
library_name: transformers
license: apache-2.0
tags:
  - custom_generate
---

# APAR decoding

## Description

Auto-parallel auto-regressive decoding (arXiv 2401.06761): the model forks a thread for each detail of its answer, and all
threads write in the same forward passes. The code is the package hf_apar: `pip install hf-apar`.

## Base model

Any model that was fine-tuned for APAR; its generation config names the ids of [Fork] and [Child] (`apar_config`).

## Model compatibility

Decoder-only language models with full or sliding-window attention. What is not supported is refused, with the
reason.

## Additional Arguments

`apar` (`bool`, `dict` or `AparConfig`, *optional*, defaults to `True`): `False` decodes plainly; a dict has settings such as
`{"max_threads": 8}`. `proposer`, `protocol` and the other arguments of hf_apar's `generate` are passed on.

## Output Type changes

None for ids: prompt and answer, in reading order. With `return_dict_in_generate=True` it is an `AparOutput`,
which has the trees too.

## Example usage

```py
output = model.generate(**inputs, custom_generate="THIS_REPOSITORY", trust_remote_code=True, max_new_tokens=512)
```

Where this folder lies in the model's own repository, `AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)`
has it as its `generate`, whose arguments are then given by name.
"""


def export_custom_generate(folder: str | Path) -> Path:
    """Write a repository for ``model.generate(custom_generate=folder, trust_remote_code=True)``; return its folder.

    It holds ``custom_generate/generate.py``, what this needs in ``custom_generate/requirements.txt``, and a card, if none
    is there: ``folder`` may be that of a checkpoint, whose ``generate`` it then is with ``trust_remote_code=True``.

    Raises:
        ConfigurationError: if ``folder`` holds another ``custom_generate/generate.py``.
    """
    target = Path(folder) / "custom_generate"
    file = target / "generate.py"
    ours = _GENERATE.read_text(encoding="utf-8")
    if file.exists() and file.read_text(encoding="utf-8") != ours:
        raise ConfigurationError(f"{file} exists and is not ours; name another folder, or remove it first")
    target.mkdir(parents=True, exist_ok=True)
    file.write_text(ours, encoding="utf-8")
    (target / "requirements.txt").write_text("hf_apar\n", encoding="utf-8")
    card = Path(folder) / "README.md"
    if not card.exists():
        card.write_text(_CARD, encoding="utf-8")
    return Path(folder)


def save_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, plain: bool = False
) -> Path:
    """Write ``model`` as an ordinary checkpoint, safetensors; return its folder.

    The model stays as it is.

    With hf_apar it forks. Without hf_apar transformers decodes whole answers plainly, since both control tokens are
    suppressed in its generation config, and so does vLLM beside which hf_apar is installed.

    Args:
        plain: leave the control tokens out, for engines that read no ``suppress_tokens``: the checkpoint decodes whole
            answers plainly in any of them, and forks in none.

    Raises:
        ConfigurationError: if ``folder`` is not empty, or an adapter is still beside the weights, as on a quantised base.
        ConfigurationError: if the control tokens cannot be left out, since they are not the vocabulary's last ones.
    """
    target = Path(folder)
    if not isinstance(model, PreTrainedModel) or any(name.endswith("base_layer") for name, _ in model.named_modules()):
        raise ConfigurationError(
            "the adapter is not merged into its base, as on a quantised one; load it onto the unquantised base with "
            "AparModelForCausalLM.from_pretrained, where it is merged: pass base= (--base) if it records the quantised one"
        )
    if target.exists() and any(target.iterdir()):
        raise ConfigurationError(f"{target} is not empty; name a new folder")
    control = find_control_tokens(model, tokenizer)
    if plain:
        _save_plain(model, tokenizer, target, control)
        return target
    suppressed = {*(_generation(model).suppress_tokens or ()), *control}
    _save(model, target, _savable(model, sorted(suppressed)))
    tokenizer.save_pretrained(target)
    return target


def _save_plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path, control: tuple[int, int]) -> None:
    rows, config = rows_without(tokenizer, control), model.config.get_text_config()
    others = [token for token in _generation(model).suppress_tokens or () if token < rows]
    generation = _savable(model, others or None)
    vars(generation).pop("apar_config", None)
    size = config.vocab_size
    config.vocab_size = rows
    try:
        _save(model, target, generation, weights_with(model, rows))
    finally:
        config.vocab_size = size
    tokenizer.save_pretrained(target)
    forget_tokens(target, control, [token_name(tokenizer, token) for token in control])


def _generation(model: PreTrainedModel) -> GenerationConfig:
    assert model.generation_config is not None
    return model.generation_config


def _savable(model: PreTrainedModel, suppress_tokens: list[int] | None) -> GenerationConfig:
    """Return a copy of the model's generation config that suppresses these tokens, such that transformers saves it."""
    saved = copy.deepcopy(_generation(model))
    saved.suppress_tokens = suppress_tokens
    for change in make_savable(saved):
        logger.warning("the generation config could not be saved as it was: %s", change)
    return saved


def _save(
    model: PreTrainedModel, target: Path, generation: GenerationConfig, weights: dict[str, Tensor] | None = None
) -> None:
    own = model.generation_config
    model.generation_config = generation
    try:
        model.save_pretrained(target, state_dict=weights)
    finally:
        model.generation_config = own
