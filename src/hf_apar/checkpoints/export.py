"""Forms in which APAR travels without this package's API: a ``custom_generate`` repository, and merged checkpoints."""

import copy
import logging
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.errors import ConfigurationError
from hf_apar.generation_settings import make_savable
from hf_apar.tokens import find_control_tokens

logger = logging.getLogger(__name__)

_GENERATE = Path(__file__).parent / "custom_generate" / "generate.py"

_CARD = """---
library_name: transformers
tags:
  - custom_generate
---

# APAR decoding

`model.generate(**inputs, custom_generate="THIS_REPOSITORY", trust_remote_code=True)` decodes one answer with many threads:
auto-parallel auto-regressive decoding (arXiv 2401.06761), by the package hf_apar. The model must be fine-tuned for it.
"""


def export_custom_generate(folder: str | Path) -> Path:
    """Write a repository for ``model.generate(custom_generate=folder, trust_remote_code=True)``; return its folder.

    It holds ``custom_generate/generate.py``, what this needs in ``custom_generate/requirements.txt``, and a card.

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


def save_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write ``model`` as an ordinary checkpoint, safetensors, that any program loads; return its folder.

    The model stays as it is.

    Without hf_apar it decodes whole answers plainly, since both control tokens are suppressed in its generation config;
    with hf_apar it forks.

    Raises:
        ConfigurationError: if ``folder`` is not empty, or an adapter is still beside the weights, as on a quantised base.
    """
    target = Path(folder)
    if not isinstance(model, PreTrainedModel) or any(name.endswith("base_layer") for name, _ in model.named_modules()):
        raise ConfigurationError(
            "the adapter is not merged into its base, as on a quantised one; load it onto the unquantised base with "
            "AparModelForCausalLM.from_pretrained, where it is merged: pass base= (--base) if it records the quantised one"
        )
    if target.exists() and any(target.iterdir()):
        raise ConfigurationError(f"{target} is not empty; name a new folder")
    own = model.generation_config
    assert own is not None
    saved = copy.deepcopy(own)
    saved.suppress_tokens = sorted({*(saved.suppress_tokens or ()), *find_control_tokens(model, tokenizer)})
    for change in make_savable(saved):
        logger.warning("the generation config could not be saved as it was: %s", change)
    model.generation_config = saved
    try:
        model.save_pretrained(target)
    finally:
        model.generation_config = own
    tokenizer.save_pretrained(target)
    return target
