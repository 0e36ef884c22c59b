"""What can be set of the making of text to train on, and what it is where nothing is set: the one place that says so."""

import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hf_apar.data.described import setting
from hf_apar.data.distillation.languages import LANGUAGES
from hf_apar.errors import ConfigurationError, MissingPackageError


class Engine(StrEnum):
    """What runs the model that writes."""

    transformers = "transformers"
    vllm = "vllm"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded by transformers: for one that is large beside its device.

    Raises:
        ConfigurationError: if it is to be in 4 bits and in 8.
    """

    load_in_4bit: bool = setting(False, "Keep the linear layers in 4 bits (NF4); embeddings and output layer stay whole.")
    load_in_8bit: bool = setting(False, "Keep the linear layers in 8 bits; embeddings and output layer stay whole.")
    attn_implementation: str | None = setting(
        None, "What computes attention: sdpa, eager, ...; left out, what transformers chooses.", free=True
    )
    device_map: str | None = setting(
        None, "Spread the layers over all GPUs: auto, balanced, sequential; or a device.", free=True
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigurationError("load_in_4bit and load_in_8bit are both set; a model is loaded in one of them")

    @property
    def bits(self) -> int | None:
        """How many bits a weight of a linear layer has; ``None`` for those of the number format."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def options(self, computed_in: str = "float32") -> dict[str, Any]:
        """Return it as options of ``from_pretrained``, for a model that computes in the number format ``computed_in``.

        Raises:
            MissingPackageError: if bitsandbytes is needed and not installed.
        """
        given = {"attn_implementation": self.attn_implementation, "device_map": self.device_map}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.bits is not None:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise MissingPackageError(
                    f"load_in_{self.bits}bit needs the package bitsandbytes; run pip install 'hf-apar[bitsandbytes]'"
                )
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=self.load_in_4bit, load_in_8bit=self.load_in_8bit, bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=computed_in,
            )  # fmt: skip
        return options


@dataclass(frozen=True, kw_only=True)
class PromptChoice:
    """Prompts of the package's own, and openings for others."""

    templates: int = setting(0, "Add so many prompts from the package's own templates.", least=0)
    opened_share: float = setting(
        0.0, "Share of the prompts without an opening whose answers must hold a list.", least=0, most=1
    )
    templates_opened: float = setting(
        1.0, "The same of the package's own that suit a list: 0 for a model that writes lists by itself.", least=0, most=1
    )
    languages: tuple[str, ...] = setting(("en",), "Of the package's own prompts: en, de, fr, es, it, pt.")

    def __post_init__(self) -> None:
        unknown = [one for one in self.languages if one not in tuple(LANGUAGES)]
        if unknown or not self.languages:
            known = ", ".join(LANGUAGES)
            raise ConfigurationError(f"languages is {list(self.languages)!r}; the package's own prompts are in {known}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model writes."""

    engine: Engine = setting(Engine.transformers, "What runs the model; vllm is faster, and an environment of its own.")
    batch_size: int = setting(64, "Texts that are gone on with at once.", least=1, free=True)
    temperature: float = setting(0.3, "Of sampling; at 0 the likeliest token is taken.", least=0)
    repetition_penalty: float = setting(1.0, "Of sampling, 1 for none; small models loop without one.", least=0.01)


@dataclass(frozen=True, kw_only=True)
class AnswerLimits:
    """How long an answer may be.

    The end of a list whose length is left to chance is never its likeliest continuation, so that a model tuned on such lists
    hardly ends one: ``max_items`` ends it. Where the answer announces more items by itself, or more or fewer follow than
    announced, it is dropped.
    """

    max_new_tokens: int = setting(384, "Longer answers are dropped.", least=1)
    max_whole_tokens: int | None = setting(
        None, "The same for prompts without an opening, where their answers mostly stay whole.", least=1
    )
    max_items: int | None = setting(None, "Numbered lists end after so many items, or as many as they announce.", least=2)


@dataclass(frozen=True, kw_only=True)
class Elaboration:
    """How details are gone on with."""

    min_detail_tokens: int = setting(
        40, "A detail ends with the sentence that reaches this length; 0 leaves the answers as they are.", least=0
    )


@dataclass(frozen=True, kw_only=True)
class TreeLimits:
    """Where answers may fork."""

    max_depth: int = setting(3, "Deepest thread; the root has depth 1.", least=1)
    max_forks: int = setting(16, "An answer that would fork more often stays whole.", least=1)
    without: tuple[str, ...] = setting((), "Rules that are switched off, by name.")
    workers: int = setting(1, "Processes.", least=1, free=True)
