"""An adapter as others can use it: what belongs to it and nothing else, its base by name, and a model card."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_apar.checkpoints.adapters import check_files, forks
from hf_apar.checkpoints.default_model import DEFAULT_BASE
from hf_apar.checkpoints.heads import find_heads
from hf_apar.checkpoints.loading import TOKENIZER_FILES
from hf_apar.checkpoints.made_with import RECIPE_FILE
from hf_apar.checkpoints.sources import is_folder, is_path, settings_in
from hf_apar.errors import ConfigurationError
from hf_apar.speculation.medusa import HEADS_FILE

_CARD_FILE = "README.md"
_FILES = (
    "adapter_model.safetensors", "generation_config.json", *TOKENIZER_FILES, "metrics.json", "medusa_metrics.json",
    RECIPE_FILE, _CARD_FILE,
)  # fmt: skip
_HUB_NAMES = {DEFAULT_BASE: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_HELD_OUT = {
    "eval_loss": "loss on held-out answers",
    "eval_fork_recall": "share of the places where these fork that are found, the text forced",
    "eval_fork_precision": "share of the forks that is right there, the text forced",
}
_ANSWERED = {
    "forks_in_parts": "share of the answers that should fork which do",
    "false_forks": "share of the answers that should not fork which do",
    "tokens_per_step": "tokens per step, answers that do not end counted as 1",
    "tokens_per_step_forked": "the same of the answers that fork",
    "ended": "share of the answers that end by themselves",
}
_CARD = """---
base_model: {base}
base_model_relation: adapter
library_name: peft{license}
pipeline_tag: text-generation
tags:
  - hf_apar
  - lora
---

# {title}

A LoRA adapter of rank {rank} for {base} that has learnt where its answers split: it writes [Fork], and a thread of its own
writes the detail, all threads in the same forward passes (APAR, arXiv 2401.06761).

```
pip install "hf-apar[cli,train]"
hf-apar generate --model {name} "..."
```

In Python `hf_apar.AparModelForCausalLM.from_pretrained("{name}")` loads it with its base, for `generate(apar=True)`, and
`hf_apar.checkpoints.loading.load_tokenizer("{name}")` its tokenizer.
{figures}{rest}"""


def export_adapter(
    adapter: str | Path, output: str | Path, *, name: str, base: str | None = None, license: str | None = None
) -> Path:
    """Write to ``output`` what of the folder ``adapter`` belongs on the Hub, with a model card if it has none; return it.

    That is the adapter, its settings, tokenizer, metrics, heads and recipe, where they are there; checkpoints of the
    training, answers, and reports of an evaluation, which hold paths of this machine, are none of it.
    ``huggingface_hub.upload_folder`` takes the result, :meth:`~hf_apar.AparModelForCausalLM.from_pretrained` the repository.

    Args:
        adapter: what ``hf-apar train`` wrote, or ``hf-apar recipe`` in ``adapter``.
        output: a new folder, or an empty one.
        name: of the repository, ``"organisation/name"``: the card tells how to load it.
        base: the model that it was trained on, by its name on the Hub; by default as it is recorded.
        license: of the adapter, by its name in model cards, such as ``"apache-2.0"``.

    Raises:
        ConfigurationError: if ``adapter`` holds no adapter that forks, its base is recorded as a folder of this machine,
            or ``output`` is not empty.
    """
    source, folder = Path(adapter), Path(output)
    check_files(source)
    if not forks(source):
        raise ConfigurationError(f"{source} learnt answers as they read and does not fork; upload it as any adapter of PEFT")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(f"{folder} is not empty; name a new folder")
    settings = settings_in(source / "adapter_config.json")
    settings["base_model_name_or_path"] = base = _named(base or settings.get("base_model_name_or_path"), source)
    folder.mkdir(parents=True, exist_ok=True)
    for file in _FILES:
        if (source / file).is_file():
            shutil.copy(source / file, folder)
    if (heads := find_heads(source)) is not None:
        shutil.copy(heads, folder)
    if (recipe := folder / RECIPE_FILE).exists():
        text = recipe.read_text(encoding="utf-8")
        text = re.sub(r"(?m)^model = .*$", lambda _: f"model = {json.dumps(base)}", text)
        text = re.sub(r'(?m)^prompts = ".*?([^/\\\\"]*)"$', r'prompts = "\1"', text)  # its folder is of this machine
        recipe.write_text(text, encoding="utf-8")
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if not (folder / _CARD_FILE).exists():
        (folder / _CARD_FILE).write_text(_card(source, settings, name, license), encoding="utf-8")
    return folder


def _named(base: object, adapter: Path) -> str:
    """Return ``base`` if it is a name that holds elsewhere."""
    if not isinstance(base, str) or not base or is_path(base) or is_folder(base):
        raise ConfigurationError(
            f"{adapter} has {base!r} as its base, which others do not have; pass base= (--base), the name of that model on "
            "the Hub"
        )
    return base


def _card(adapter: Path, settings: Mapping[str, Any], name: str, license: str | None) -> str:
    base = str(settings["base_model_name_or_path"])
    kept = {
        f"`{HEADS_FILE}` holds Medusa heads, which `hf_apar.load_heads` loads.": find_heads(adapter),
        f"`{RECIPE_FILE}` is what `hf-apar recipe` was told.": (adapter / RECIPE_FILE).is_file(),
    }
    figures = "\n".join(_figures(adapter))
    return _CARD.format(
        name=name, title=name.rpartition("/")[2], base=_HUB_NAMES.get(base, base), rank=settings.get("r"),
        license=f"\nlicense: {license}" if license else "",
        figures=f"\n| | |\n|---|---|\n{figures}\n" if figures else "",
        rest="".join(f"\n{line}\n" for line, is_there in kept.items() if is_there),
    )  # fmt: skip


def _figures(adapter: Path) -> Iterator[str]:
    """Yield the rows of the card's table, of the figures that lie with the adapter."""
    held_out = _json(adapter / "metrics.json").get("final", {})
    yield from (f"| {says} | {held_out[key]:.3f} |" for key, says in _HELD_OUT.items() if key in held_out)
    report = _json(adapter / "evaluation" / "figures.json")
    found = report.get("figures", {}).get("apar", {}).get("all", {})
    for says, one in ((says, found[key]) for key, says in _ANSWERED.items() if key in found):
        yield f"| {says} (of {one['n']}) | {one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f}) |"


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found
