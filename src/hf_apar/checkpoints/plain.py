"""A checkpoint without control tokens, for engines that know nothing of them: it cannot write what it does not have."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.errors import ConfigurationError

_LISTS = ("additional_special_tokens", "extra_special_tokens")  # of a tokenizer's settings


def rows_without(tokenizer: PreTrainedTokenizerBase, control: Collection[int]) -> int:
    """Return how many rows of the vocabulary stay where ``control`` tokens go, all that follow them without a name.

    Raises:
        ConfigurationError: if other tokens of the tokenizer follow, whose ids would change.
    """
    rows = min(control)
    later = sorted(name for name, token in tokenizer.get_vocab().items() if token > rows and token not in control)
    if later:
        raise ConfigurationError(
            f"the tokens {later[:3]} follow the control tokens {sorted(control)} in the vocabulary, so that these cannot be "
            "left out; merge without --plain, and have the engine ban them (logit_bias -100 for each)"
        )
    return rows


def weights_with(model: PreTrainedModel, rows: int) -> dict[str, Tensor]:
    """Return the weights of ``model`` with the first ``rows`` of its vocabulary, tied ones still one tensor."""
    output = model.get_output_embeddings()
    layers = [model.get_input_embeddings(), *([] if output is None else [output])]
    whole = [one for layer in layers for one in (layer.weight, getattr(layer, "bias", None)) if one is not None]
    cut = {one.data_ptr(): one.detach()[:rows].clone() for one in whole}
    return {name: cut.get(tensor.data_ptr(), tensor) for name, tensor in model.state_dict().items()}


def forget_tokens(folder: Path, control: Collection[int], names: Collection[str]) -> None:
    """Take tokens out of the tokenizer that was saved in ``folder``; they were added to its vocabulary, at its end.

    Raises:
        ConfigurationError: if it still has them: they are no added tokens.
    """
    from transformers import AutoTokenizer

    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name.startswith(("tokenizer", "special_tokens", "added_tokens")):
            _forget(content, {str(one) for one in control} | {*names}, {*names})
            file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if left := sorted({*names} & AutoTokenizer.from_pretrained(folder).get_vocab().keys()):
        raise ConfigurationError(
            f"{left} belong to the tokenizer's own vocabulary, so that they cannot be left out; merge without --plain, and "
            "have the engine ban them (logit_bias -100 for each)"
        )


def _forget(content: dict[str, Any], keys: Collection[str], names: Collection[str]) -> None:
    """Take added tokens out of one file: entries of lists by their content, of dicts by their id or name."""

    def named(entry: Any) -> bool:
        return (entry.get("content") if isinstance(entry, dict) else entry) in names

    for name in ("added_tokens", *_LISTS):
        if isinstance(content.get(name), list):
            content[name] = [entry for entry in content[name] if not named(entry)]
    for name in keys:
        content.pop(name, None)  # added_tokens.json
        content.get("added_tokens_decoder", {}).pop(name, None)
