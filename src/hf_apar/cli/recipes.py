"""Commands from a chat model to one that forks, all stages as a recipe file says, and on to the Hub: recipe, export."""

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_apar.checkpoints.made_with import RECIPE_FILE
from hf_apar.checkpoints.writing import alone
from hf_apar.cli.common import (
    Dtype,
    ModelOption,
    app,
    chosen_device,
    chosen_dtype,
    load,
    load_untuned,
    loading_options,
    one_process,
)
from hf_apar.cli.data import answer_prompts, elaborate_answers, extract_trees, template_questions_of
from hf_apar.cli.evaluate import ARMS, Measuring, run_evaluation, show
from hf_apar.cli.stages import Stages
from hf_apar.cli.training import tell_metrics
from hf_apar.cli.writing import TextWriter
from hf_apar.data.described import not_free
from hf_apar.training.recipe import EXAMPLE, Recipe, read_recipe, written

EVALUATED = 20  # prompts of the package's own suites that the last stage asks


class Stage(StrEnum):
    """The stages of a recipe but for the last."""

    answers = "answers"
    longer = "longer"
    trees = "trees"
    adapter = "adapter"
    heads = "heads"


def _no_folder(prompts: Path | None) -> Path | None:
    if prompts is not None and prompts.is_dir():
        raise typer.BadParameter(f"{prompts} is a folder; give a file of prompts, JSON Lines or one array")
    return prompts


def _show_example(wanted: bool) -> None:
    if wanted:
        typer.echo(written(read_recipe(EXAMPLE)), nl=False)
        raise typer.Exit


@app.command("recipe")
def recipe_command(
    output: Annotated[Path, typer.Option(help="Folder for all that is made; the adapter lies in its `adapter`.")],
    file: Annotated[
        Path | None,
        typer.Argument(help="TOML file, see --example; without one all is as by default.", exists=True, dir_okay=False),
    ] = None,
    model: ModelOption = None,
    prompts: Annotated[Path | None, typer.Option(callback=_no_folder, help="JSON Lines of prompts.")] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Make again what was made with other settings, and all after it; the old is kept."),
    ] = False,
    until: Annotated[
        Stage | None, typer.Option(help="Stop after this stage; a later call makes the rest, in another environment maybe.")
    ] = None,
    example: Annotated[
        bool,
        typer.Option(
            "--example", is_eager=True, callback=_show_example,
            help="Write a recipe of the default model's settings, with every key and what it says, and do nothing else.",
        ),
    ] = False,
) -> None:  # fmt: skip
    """From a chat model to one that forks: all of these commands and evaluate; goes on where it stopped."""
    one_process("hf-apar recipe", "start it without a launcher, or its stages one by one, as docs/big-models.md does")
    recipe = Recipe() if file is None else read_recipe(file)
    given: dict[str, Any] = {"model": model, "prompts": None if prompts is None else str(prompts)}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    output.mkdir(parents=True, exist_ok=True)
    with alone(output):
        RecipeRun(recipe, output, restart=restart).run(until)
    plain = " --plain" if recipe.train.sequential else ""
    done = f'done: hf-apar generate{plain} --model {output / "adapter"} "..."'
    typer.echo(f"done, up to {until}; without --until the rest is made" if until else done)


@app.command("export")
def export_command(
    output: Annotated[Path, typer.Argument(help="A new folder.", file_okay=False)],
    name: Annotated[str, typer.Option(help="Of the repository on the Hub, ORGANISATION/NAME; the card says it.")],
    model: ModelOption = None,
    base: Annotated[str | None, typer.Option(help="Hub name of the adapter's base, where a folder is recorded.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the adapter, as model cards name it: apache-2.0.")] = None,
) -> None:
    """Write to OUTPUT what of an adapter others need, with a model card: a folder to upload to the Hub."""
    from hf_apar.checkpoints.default_model import DEFAULT_ADAPTER
    from hf_apar.checkpoints.publishing import export_adapter

    export_adapter(model or DEFAULT_ADAPTER, output, name=name, base=base, license=license)
    typer.echo(f"read {output / 'README.md'}, then: hf upload {name} {output}")


class RecipeRun:
    """A recipe that is followed in the folder ``output``, each stage once."""

    def __init__(self, recipe: Recipe, output: Path, *, restart: bool) -> None:
        self.recipe, self.output, self.adapter = recipe, output, output / "adapter"
        self.dtype = Dtype.bfloat16 if recipe.bf16 else Dtype.float32
        variables = recipe.chat_template_kwargs
        self.writer = TextWriter(recipe.model, recipe.sampling, recipe.loading, self.dtype, recipe.seed, variables)
        self.answers, self.longer = output / "answers.jsonl", output / "longer.jsonl"
        self.source = self.longer if recipe.elaborate.min_detail_tokens else self.answers
        self.trees, self.weights = self.source.with_suffix(".trees.jsonl"), self.adapter / "adapter_model.safetensors"
        heads = ("medusa.safetensors", "medusa_checkpoints", "medusa_metrics.json")
        self.stages = Stages(output, {
            "answers": [self.answers, output / "answers.jsonl.done"], "longer": [self.longer, output / "longer.jsonl.done"],
            "trees": [self.trees], "adapter": [self.adapter], "heads": [self.adapter / name for name in heads],
            "evaluation": [self.adapter / "evaluation"],
        }, restart=restart)  # fmt: skip

    def run(self, until: Stage | None = None) -> None:
        """Make what is not made yet, up to a stage, and keep the recipe with the adapter.

        Raises:
            ConfigurationError: if a stage was made with other settings, and is not to be made again.
        """
        if not self.weights.is_file():
            self._check()
        makes: dict[Stage | None, Callable[[], None]] = {
            Stage.answers: self._make_answers, Stage.longer: self._make_longer, Stage.trees: self._make_trees,
            Stage.adapter: self._train,
        }  # fmt: skip
        if not self.recipe.train.sequential:  # heads and figures are those of a model that forks
            makes |= {Stage.heads: self._train_heads} if self.recipe.with_heads else {}
            makes[None] = self._evaluate
        order = list(Stage)
        for stage, make in makes.items():
            if until is not None and (stage is None or order.index(stage) > order.index(until)):
                break
            make()

    def _check(self) -> None:
        """Raise what keeps the model from being taught, before it answers for hours."""
        from hf_apar.checkpoints.readiness import check_model
        from hf_apar.data.extraction.rules import rules_without
        from hf_apar.training.rows.collator import mask_mode

        template_questions_of(self.recipe.asking, self.recipe.seed)
        rules_without(self.recipe.extract.without)
        mask_mode(self.recipe.loading.attn_implementation)
        pair = load_untuned(self.recipe.model, Dtype.float32, self.recipe.loading)
        check_model(*pair, chat_template_kwargs=self.recipe.chat_template_kwargs)

    def _make_answers(self) -> None:
        recipe, prompts = self.recipe, None if self.recipe.prompts is None else Path(self.recipe.prompts)
        settings = self.writer.settings() | not_free(recipe.asking) | not_free(recipe.answers)
        with self.stages.stage("answers", settings, [] if prompts is None else [prompts]) as wanted:
            if _tell(1, "the model answers prompts in its own words", wanted):
                answer_prompts(self.writer, prompts, self.answers, recipe.asking, recipe.answers)

    def _make_longer(self) -> None:
        recipe = self.recipe
        settings = self.writer.settings() | not_free(recipe.elaborate)
        with self.stages.stage("longer", settings, [self.answers]) as wanted:
            if self.source == self.longer and _tell(2, "it goes on with short details", wanted):
                elaborate_answers(self.writer, self.answers, self.longer, recipe.elaborate)

    def _make_trees(self) -> None:
        with self.stages.stage("trees", not_free(self.recipe.extract), [self.source]) as wanted:
            if _tell(3, "trees are found in the answers", wanted):
                extract_trees(self.source, self.trees, self.recipe.extract)

    def _train(self) -> None:
        recipe = self.recipe
        told: dict[str, Any] = {"seed": recipe.seed, "chat_template_kwargs": recipe.chat_template_kwargs}
        told["bf16"] = recipe.bf16
        settings = {"model": recipe.model, **told} | not_free(recipe.select) | not_free(recipe.loading)
        settings |= not_free(recipe.train)
        goes_on = {name: settings.pop(name) for name in ("fork_bias", "repetition_penalty")}  # written, and not learnt
        told["loading"] = recipe.loading
        with self.stages.stage("adapter", settings, [self.trees], goes_on=goes_on) as wanted:
            lesson = "the answers as they read" if recipe.train.sequential else "where to fork"
            if _tell(4, f"the model learns {lesson}", wanted):
                from hf_apar.checkpoints.default_model import DEFAULT_BASE
                from hf_apar.training.fine_tuning import train

                model = recipe.model or DEFAULT_BASE
                tell_metrics(train(self.trees, self.adapter, recipe.select, recipe.train, model=model, **told))
        self._keep_recipe()

    def _keep_recipe(self) -> None:
        file, text = self.adapter / RECIPE_FILE, written(self.recipe)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")

    def _train_heads(self) -> None:
        recipe = self.recipe
        told: dict[str, Any] = {"seed": recipe.seed, "chat_template_kwargs": recipe.chat_template_kwargs}
        settings = {**told, "dtype": self.dtype} | not_free(recipe.loading) | not_free(recipe.heads)
        with self.stages.stage("heads", settings, [self.trees, self.weights]) as wanted:
            if _tell(5, "heads learn what it writes next", wanted):
                from hf_apar.training.heads import train_medusa

                pair = load(str(self.adapter), self.dtype, loading=recipe.loading)
                tell_metrics(train_medusa(*pair, self.trees, self.adapter, recipe.heads, **told))

    def _evaluate(self) -> None:
        base, variables = self.recipe.model, self.recipe.chat_template_kwargs
        settings = {"base": base, "chat_template_kwargs": variables, "dtype": self.dtype} | not_free(self.recipe.loading)
        decoding = self.adapter / "generation_config.json"
        with self.stages.stage("evaluation", settings, [self.weights, decoding]) as wanted:
            if _tell(6, "it answers prompts that it has not seen", wanted):
                from hf_apar.checkpoints.default_model import DEFAULT_BASE
                from hf_apar.evaluation.folder import prompts_of
                from hf_apar.evaluation.models import Models

                dtype, device = chosen_dtype(self.dtype), chosen_device("auto")
                options = loading_options(self.recipe.loading, self.dtype)
                models = Models(str(self.adapter), base or DEFAULT_BASE, dtype, device, variables or {}, options)
                prompts = prompts_of(["own"], sample=EVALUATED)
                show(run_evaluation(models, ARMS, prompts, self.adapter / "evaluation", Measuring(likelihood=True)))


def _tell(number: int, what: str, wanted: bool) -> bool:
    """Say what a stage does, or that it was done, and return ``wanted``."""
    typer.secho(f"{number}. {what}" + ("" if wanted else ": made already"), bold=wanted, err=True)
    return wanted
