"""APAR decoding for `model.generate(custom_generate=...)`: many threads write one answer (arXiv 2401.06761).

The model must be fine-tuned for APAR, and carry the ids of [Fork] and [Child] in its generation config.
"""

from functools import partial
from inspect import signature
from typing import Any, cast

from transformers import GenerationMixin, PreTrainedModel

from hf_apar import AparConfig
from hf_apar.generation import generate_in_threads


def generate(model: PreTrainedModel, *, apar: bool | AparConfig | dict[str, object] = True, **arguments: Any) -> object:
    """Generate as `model.generate` does, in threads; `apar` is a bool, an AparConfig, or a dict of its settings."""
    named = signature(GenerationMixin.generate).parameters  # all of them come, most as None
    given = {name: value for name, value in arguments.items() if value is not None or name not in named}
    plain = partial(cast(Any, type(model)).generate, model)
    if apar is False:
        return plain(**given)
    return generate_in_threads(model, plain, apar=AparConfig.from_dict(apar) if isinstance(apar, dict) else apar, **given)
