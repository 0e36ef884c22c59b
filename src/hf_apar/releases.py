"""What differs between the releases of transformers that are supported: their range, and names that changed within it."""

import warnings
from collections.abc import Mapping
from functools import cache
from inspect import signature
from typing import Any

import transformers
from packaging.version import Version
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import logits_process

OLDEST, NEWEST = "5.16", "5.24"
"""The releases at the two ends of the range that the tests run on; ``pyproject.toml`` allows no others."""

CACHE_NAMES = ("cache", "past_key_values")
"""What a forward pass calls its key-value cache: 5.24 renamed the second to the first; models on the Hub keep theirs."""


def takes(function: Any, name: str) -> bool:
    """Has ``function`` a parameter called ``name``?"""
    return name in signature(function).parameters


def cache_argument(model: PreTrainedModel) -> str:
    """Return under which of :data:`CACHE_NAMES` ``model`` takes its cache."""
    return _cache_argument(type(model).forward)


@cache
def _cache_argument(forward: Any) -> str:  # asked at every step
    return next((name for name in CACHE_NAMES if takes(forward, name)), CACHE_NAMES[1])


GENERATE_CACHE = next(name for name in CACHE_NAMES if takes(GenerationMixin.prepare_inputs_for_generation, name))
"""What this release's ``generate`` calls the cache."""


def checkpointing_argument() -> str:
    """Return what ``TrainingArguments`` calls the recomputing of activations: 5.24 renamed the second to the first."""
    from transformers import TrainingArguments  # it brings the Trainer, PEFT and all that these look for

    return next(name for name in ("activation_checkpointing", "gradient_checkpointing") if takes(TrainingArguments, name))


def without_cache(arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the cache among ``arguments``, by whatever name, ``None`` for none, and the other arguments.

    >>> without_cache({"past_key_values": 1, "use_cache": True})
    (1, {'use_cache': True})
    """
    rest = dict(arguments)
    found = [value for name in CACHE_NAMES if (value := rest.pop(name, None)) is not None]
    return (found[0] if found else None), rest


def _processors(*names: str) -> tuple[type, ...]:
    """Return those of transformers' logits processors that this release has: some came or went within the range."""
    return tuple(getattr(logits_process, name) for name in names if hasattr(logits_process, name))


SCORES_ONLY = _processors(
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper", "InfNanRemoveLogitsProcessor",
    "LogitNormalization", "SuppressTokensLogitsProcessor",
)  # fmt: skip
"""Processors of transformers that never look at ``input_ids``."""

STATEFUL = _processors(
    "UnbatchedClassifierFreeGuidanceLogitsProcessor", "ClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor", "WhisperNoSpeechDetection", "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor",
)  # fmt: skip
"""Processors with a state or a cache of their own, or with several rows for one sequence: they cannot follow threads."""


@cache
def warn_outside_range() -> None:
    """Warn once if the installed transformers is none that was tested."""
    if not Version(OLDEST) <= Version(Version(transformers.__version__).base_version) < _after(NEWEST):
        warnings.warn(
            f"hf_apar is tested with transformers {OLDEST} to {NEWEST}, and {transformers.__version__} is installed; if "
            f"something fails, pip install 'transformers>={OLDEST},<{_after(NEWEST)}'",
            stacklevel=3,
        )


def _after(release: str) -> Version:
    """Return the first version that is not a patch of ``release``, given as major.minor."""
    major, minor = Version(release).release[:2]
    return Version(f"{major}.{minor + 1}")
