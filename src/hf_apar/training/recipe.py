"""A recipe: what each stage on the way from a chat model to one that forks is told, as a TOML file."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from hf_apar.data.described import as_toml, setting, with_table
from hf_apar.data.settings import AnswerLimits, Elaboration, Loading, PromptChoice, Sampling, TreeLimits
from hf_apar.errors import ConfigurationError
from hf_apar.training.tuning import HeadsTuning, Selection, Tuning

EXAMPLE = Path(__file__).parents[1] / "models" / "smollm2-135m-apar" / "recipe.toml"
"""That of the default model."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all stages are told, and a group for each; in a file a group is a table of its name."""

    model: str | None = setting(None, "Folder or Hub name of the model to teach; left out, the default base.")
    prompts: str | None = setting(None, "File of prompts, JSON Lines or one array; left out, the package's templates alone.")
    seed: int = setting(0, "Of whatever is drawn at random.", least=0, most=2**32 - 1)
    bf16: bool = setting(False, "Compute in bfloat16 where it is safe.")
    with_heads: bool = setting(True, "Train Medusa heads too.")
    chat_template_kwargs: dict[str, object] | None = setting(None, "Arguments of the chat template: a table.")
    loading: Loading = Loading()
    asking: PromptChoice = PromptChoice(templates=6976, opened_share=0.5)
    sampling: Sampling = Sampling()
    answers: AnswerLimits = AnswerLimits()
    elaborate: Elaboration = Elaboration()
    extract: TreeLimits = TreeLimits()
    select: Selection = Selection()
    train: Tuning = Tuning()
    heads: HeadsTuning = HeadsTuning()


_LONGEST = 1 << 16  # bytes of a recipe: a key of many dots takes time with the square of its length


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in the file ``path``.

    Raises:
        ConfigurationError: if it is no TOML, longer than 64 KiB, or has a key that is unknown or a value that cannot be.
    """
    if (size := path.stat().st_size) > _LONGEST:
        raise ConfigurationError(f"{path} has {size:,} bytes, and a recipe {_LONGEST:,} at most; is it another file?")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of too many digits, or nested too deeply
        raise ConfigurationError(f"{path} is no TOML: {error}") from error
    return with_table(Recipe(), table, str(path))


def written(recipe: Recipe) -> str:
    """Return ``recipe`` as a file that has every key with what it says; those that are left as they are are comments."""
    return as_toml(recipe, Recipe())
