"""What can be set of the making of text to train on, and what it is where nothing is set: the one place that says so."""

from dataclasses import dataclass
from enum import StrEnum

from hf_apar.data.described import setting
from hf_apar.data.distillation.languages import LANGUAGES
from hf_apar.errors import ConfigurationError


class Engine(StrEnum):
    """What runs the model that writes."""

    transformers = "transformers"
    vllm = "vllm"


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
    hardly ends one: ``max_items`` ends it. Where more items are announced, or more or fewer follow than announced, the
    answer is dropped.
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
    taper: int = setting(
        0, "Each later detail may be so many tokens shorter; by a title's length all end together.", least=0
    )


@dataclass(frozen=True, kw_only=True)
class TreeLimits:
    """Where answers may fork."""

    max_depth: int = setting(3, "Deepest thread; the root has depth 1.", least=1)
    max_forks: int = setting(16, "An answer that would fork more often stays whole.", least=1)
    without: tuple[str, ...] = setting((), "Rules that are switched off, by name.")
    workers: int = setting(1, "Processes.", least=1, free=True)
