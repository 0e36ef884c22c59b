"""What the commands that answer share: how tokens are chosen, heads, and what is told of an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hf_apar.cli.common import Dtype, known_heads, load, load_any, named, on_device, quietly, say, tell
from hf_apar.config import AparConfig
from hf_apar.data.described import setting
from hf_apar.tree.display import counted

if TYPE_CHECKING:
    from hf_apar.cli.compare import AparResult, Method, Result
    from hf_apar.speculation.proposer import Proposer

HeadsOption = Annotated[
    str | None,
    typer.Option(
        callback=known_heads,
        help="Folder or Hub name of Medusa heads, or of a model that they lie with; default: those of this model, if any.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How questions are answered, and tokens chosen: any option of sampling samples, temperature 0 is greedy.

    >>> Answering(top_p=0.9).options()
    {'do_sample': True, 'top_p': 0.9}
    >>> Answering(temperature=0.0, top_p=0.9, repetition_penalty=1.1).options()
    {'do_sample': False, 'repetition_penalty': 1.1}
    """

    system: str | None = setting(None, "What the model is told before the question.")
    max_new_tokens: int = setting(512, "Bound on all tokens of all threads together.", least=1)
    max_threads: int | None = setting(None, "Threads that may live at once.", least=1)
    fork_bias: float | None = setting(None, "Added to the logit of [Fork]: more forks, or fewer.")
    plain: bool = setting(False, "Decode plainly only; any chat model will do.")
    no_heads: bool = setting(False, "Write without Medusa heads.")
    do_sample: bool = setting(False, "Sample, instead of the likeliest token.")
    temperature: float | None = setting(None, "Of the sampling; 0 takes the likeliest token.", least=0)
    top_p: float | None = setting(None, "Sample of the likeliest tokens that have this share together.", least=0, most=1)
    top_k: int | None = setting(None, "Sample of so many likeliest tokens; 0 for all.", least=0)
    repetition_penalty: float | None = setting(None, "Above 1: say again less; 1 for none.", least=0.01)
    seed: int = setting(0, "Seed of whatever is drawn at random.", least=0, most=2**32 - 1)

    @property
    def config(self) -> AparConfig | None:
        """The settings of threads; ``None`` for plain decoding."""
        return None if self.plain else AparConfig(max_threads=self.max_threads, fork_bias=self.fork_bias)

    def options(self) -> dict[str, object]:
        """Return the options of ``generate``."""
        refuse_together("--do-sample", self.do_sample, {"--temperature 0": self.temperature == 0}, "draws")
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None}
        sampled = self.temperature != 0 and (self.do_sample or bool(given))
        options: dict[str, object] = {"do_sample": sampled, **(given if sampled else {})}
        return options if self.repetition_penalty is None else options | {"repetition_penalty": self.repetition_penalty}

    def loaded(self, model: str | None, base: str | None, heads: str | None, device: str, dtype: Dtype) -> "Method":
        """Load what answers, with what makes its drafts; it has no prompt yet."""
        only_apar = {"--max-threads": self.max_threads, "--fork-bias": self.fork_bias, "--heads": heads}
        refuse_together("--plain", self.plain, only_apar, "leaves APAR out")
        refuse_together("--no-heads", self.no_heads, {"--heads": heads}, "leaves the heads out")
        options = self.options()
        loaded, tokenizer = (load_any if self.plain else load)(model, dtype, base)
        from hf_apar.cli.compare import Method

        proposer = None if self.no_heads or self.plain else heads_for(model, heads)
        return Method(on_device(loaded, device), tokenizer, [], self.max_new_tokens, options, self.seed, True, proposer)


def refuse_together(name: str, given: bool, others: Mapping[str, object], why: str) -> None:
    """Refuse options that say nothing beside one that was given."""
    for other, value in others.items():
        if given and value is not None and value is not False:
            raise typer.BadParameter(f"{name} {why}, so that {other} means nothing; give one of them")


def heads_for(model: str | None, heads: str | None) -> "Proposer | None":
    """Return what makes drafts: ``heads`` by their folder or Hub name, or those that lie with the model, if any."""
    from hf_apar.checkpoints.default_model import DEFAULT_ADAPTER
    from hf_apar.checkpoints.heads import find_heads, load_heads
    from hf_apar.speculation.medusa import MedusaDrafts

    place = heads or model or str(DEFAULT_ADAPTER)
    with quietly(), named(place):
        return MedusaDrafts(load_heads(place)) if heads or find_heads(place) else None


def both_ways(method: "Method", config: AparConfig | None, *, plain: bool) -> "tuple[Result | None, AparResult | None]":
    """Decode plainly if ``plain``, and in threads if there is a ``config``; where both are shown, say which is which."""
    from hf_apar.cli.compare import Interrupted

    told = plain and config is not None and method.show
    if plain and config is not None:
        method.warm_up(config)
    if told:
        typer.secho("--- Plain decoding", bold=True)
    one = method.plain() if plain else None
    if told:
        typer.secho("--- APAR", bold=True)
    try:
        return one, None if config is None else method.apar(config)
    except Interrupted as stop:
        if one is not None and not stop.text:  # that answer is there
            raise Interrupted(one.text, one.recorded) from stop
        raise


def summarise(one: "Result | None", many: "AparResult | None") -> None:
    """Write what the answer cost; to the standard error where the output is one answer alone."""
    err = one is None or many is None
    if many is not None:
        stats, threads = many.stats, _thread_count(many)
        typer.echo(err=err)
        tell(
            f"{counted(threads, 'thread')}, {counted(stats.tokens, 'token')} in {counted(stats.steps, 'step')} "
            f"({stats.tokens_per_step:.2f} a step), {many.seconds:.2f} s; peak KV cache {counted(stats.peak_kv, 'slot')}, "
            f"{stats.peak_kv / stats.kv_if_sequential:.0%} of sequential",
            dim=True, err=err,
        )  # fmt: skip
    for name, result in (("plain", one), ("APAR", many)):
        if result is not None:
            speed = f"{result.tokens_per_second:7.1f} tokens/s"
            tell(f"{name:>5}: {result.tokens:5d} tokens {result.seconds:8.2f} s {speed}", err=err)
    if one is not None and many is not None and one.tokens and many.tokens:
        tell(
            f"APAR is {many.tokens_per_second / one.tokens_per_second:.2f} times as fast per token, "
            f"{one.seconds / many.seconds:.2f} times in all",
            bold=True, err=err,
        )  # fmt: skip


def say_what_was_cut(one: "Result | None", many: "AparResult | None", limit: int) -> None:
    """Say which threads the limit of tokens kept from ending."""
    if many is not None and many.unfinished:
        threads = counted(_thread_count(many), "thread")
        say(f"cut at {counted(limit, 'token')}: {many.unfinished} of {threads} unfinished; give --max-new-tokens more")
    if one is not None and one.unfinished:
        say(f"the plain answer was cut at {counted(limit, 'token')}; give --max-new-tokens more")


def _thread_count(many: "AparResult") -> int:
    return len(cast(Sequence[object], many.tree["threads"]))
