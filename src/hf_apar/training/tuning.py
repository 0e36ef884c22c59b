"""What can be set of the training, and what it is where nothing is set: the one place that says so."""

from dataclasses import dataclass

from hf_apar.data.described import setting
from hf_apar.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which answers are trained on, and in which proportions.

    Of the structured answers some come once more as they read without forks
    (:func:`~hf_apar.training.rows.features.unforked`): decoded plainly, with [Fork] banned, the model must know that a
    title's detail is followed by the next title and not by EOS.

    Raises:
        ConfigurationError: if a share is out of its range.
    """

    structured_share: float = setting(
        0.67, "Share of the answers that fork; of the others so many are drawn.", least=0, most=1
    )
    unforked_share: float = setting(
        0.15, "Of these so many come once more without forks, for plain decoding.", least=0, most=1
    )
    held_out: float = setting(0.05, "Share of the answers kept for the metrics.", least=0, most=1)
    max_repetition: float = setting(
        0.1,
        "Leave out answers that repeat more of their runs of five words, a title, or a sibling; 1 keeps all.",
        least=0,
        most=1,
    )
    max_forks: int | None = setting(
        None, "Leave out answers that fork more often, which a model does not learn to end.", least=1
    )
    min_balance: float = setting(
        0.0,
        "Leave out answers that fork and whose text is less than so many times their longest path for each thread; at 1 "
        "all threads would be equally long, and begin at once.",
        least=0,
        most=1,
    )

    def __post_init__(self) -> None:
        if not 0 < self.structured_share <= 1 or not 0 < self.held_out < 1 or not 0 <= self.unforked_share <= 1:
            raise ConfigurationError(
                f"structured_share is {self.structured_share}, held_out {self.held_out} and unforked_share "
                f"{self.unforked_share}; the first is above 0 and at most 1, the second between 0 and 1, the last one of "
                "these or between them"
            )


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How an adapter is trained."""

    rank: int = setting(32, "Rank of LoRA, whose scale is 2.", least=1)
    learning_rate: float = setting(4e-4, "Peak learning rate; 3 % of the steps warm up to it, then it falls along a cosine.")
    token_rate: float = setting(12.0, "The rows of [Fork] and [Child] learn so many times faster.")
    epochs: float = setting(1.0, "Passes over the answers; more where they are few.")
    max_steps: int = setting(-1, "Steps, in place of epochs; -1 for none.")
    max_length: int = setting(1024, "Tokens of a row; several answers share one.", least=1)
    batch_size: int = setting(1, "Rows computed at once: more on a GPU.", least=1)
    accumulation: int = setting(1, "So many batches are one optimizer step.", least=1)
    fork_bias: float | None = setting(
        None, "The checkpoint's default, added to the logit of [Fork]; left out, that of the adapter before, or 0."
    )  # fmt: skip
    repetition_penalty: float | None = setting(
        None, "The checkpoint's default, 1 for none; left out, that of the adapter before, or of the model.",
        least=0.01,
    )  # fmt: skip
    save_steps: int = setting(10, "Steps between two checkpoints.", least=1, free=True)
    eval_steps: int = setting(100, "Steps between two evaluations.", least=1, free=True)
    gradient_checkpointing: bool = setting(
        False, "Keep no activations but the layers' inputs: a third more time, a fraction of the memory.", free=True
    )
    sequential: bool = setting(
        False, "Learn each answer as the plain text that it reads as, without control tokens: what forking is compared with."
    )
    compile: bool = setting(
        False, "Compile the model first: minutes, then steps of about two thirds the time; rows have one length.", free=True
    )


@dataclass(frozen=True, kw_only=True)
class HeadsTuning:
    """How Medusa heads are trained."""

    length: int = setting(5, "Guesses in a row.", least=1)
    inner_size: int = setting(1024, "Width of the heads' gated layer.", least=1)
    draft_vocabulary: int = setting(8192, "So many of the answers' most frequent tokens may be guessed.", least=8)
    learning_rate: float = setting(1e-3, "Peak learning rate.")
    epochs: float = setting(2.0, "Passes over the answers.")
    max_steps: int = setting(-1, "Steps, in place of epochs; -1 for none.")
    max_length: int = setting(1024, "Tokens of a row; several answers share one.", least=1)
    places: int = setting(256, "Places of a row that are guessed from, drawn anew each time.", least=1)
    save_steps: int = setting(50, "Steps between two checkpoints.", least=1, free=True)
    eval_steps: int = setting(250, "Steps between two evaluations.", least=1, free=True)
