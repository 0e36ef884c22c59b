"""Medusa heads: small layers on the model's last hidden state that guess the tokens after the next one.

Source: Medusa (Cai et al., 2024), with the heads in sequence (Hydra, Ankner et al., 2024): each guess also sees the tokens
guessed before it. One cell serves every place, and the guesses are scored by rows of the model's own output layer: those of
the most frequent tokens (FR-Spec, Zhao et al., 2025), so that a guess costs little beside a step.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_apar.checks import eos_token_ids
from hf_apar.errors import ConfigurationError
from hf_apar.growth import GrowingTree
from hf_apar.speculation.proposer import Draft, Proposer, Run
from hf_apar.tree import Thread

HEADS_FILE = "medusa.safetensors"


class MedusaHeads(nn.Module):
    """The cell that turns the state after one token into a guess of the state after the next.

    The state before the first guess is the model's last hidden state, the input of its output layer.

    Args:
        hidden_size: of the model.
        inner_size: of the cell's gated layer.
        draft_ids: the tokens that may be guessed, (draft vocabulary,).
        length: how many guesses in a row the cell was trained for.
    """

    draft_ids: Tensor

    def __init__(self, hidden_size: int, inner_size: int, draft_ids: Tensor, length: int) -> None:
        super().__init__()
        self.hidden_size, self.inner_size, self.length = hidden_size, inner_size, length
        self.register_buffer("draft_ids", draft_ids.long())
        self.gate = nn.Linear(2 * hidden_size, inner_size, bias=False)
        self.up = nn.Linear(2 * hidden_size, inner_size, bias=False)
        self.down = nn.Linear(inner_size, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)  # at first the model's own state is the guess

    def forward(self, state: Tensor, embedded: Tensor) -> Tensor:
        """Return the state after a token: ``state`` before it and its embedding are (..., hidden)."""
        width = (self.hidden_size,)
        both = torch.cat([functional.rms_norm(state, width), functional.rms_norm(embedded, width)], dim=-1)
        return state + cast(Tensor, self.down(functional.silu(self.gate(both)) * self.up(both)))

    def save(self, folder: Path) -> None:
        """Write the heads to ``folder`` in bfloat16."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else torch.int32).contiguous()
            for name, tensor in self.state_dict().items()
        }
        save_file(tensors, folder / HEADS_FILE, metadata={"medusa": json.dumps({"length": self.length})})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load what :meth:`save` wrote, in float32.

        Raises:
            ConfigurationError: if ``folder`` holds no heads.
        """
        from safetensors import safe_open

        if not (folder / HEADS_FILE).is_file():
            raise ConfigurationError(f"{folder} has no {HEADS_FILE}; give a folder that hf-apar train-medusa wrote")
        with safe_open(folder / HEADS_FILE, framework="pt") as file:
            settings = json.loads(file.metadata()["medusa"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        inner, doubled = tensors["gate.weight"].shape
        heads = cls(doubled // 2, inner, tensors["draft_ids"], int(settings["length"]))
        heads.load_state_dict(tensors)
        return heads


class MedusaDrafts(Proposer):
    """Proposes the likeliest guess of ``heads`` at each place, after the logits processors that the model's choice meets.

    A thread that has just begun has no state yet, and no draft in its first step.

    Args:
        heads: trained for the model that decodes.
        num_tokens: the longest draft; by default as long as the heads were trained for.
        schedule: see :class:`~hf_apar.speculation.proposer.Proposer`.
        confidence: a draft ends before the first guess that the heads give less than this probability.
    """

    watches = True

    def __init__(
        self,
        heads: MedusaHeads,
        *,
        num_tokens: int | None = None,
        schedule: str | None = None,
        confidence: float = 0.0,
    ) -> None:
        self.heads, self.schedule, self.confidence = heads, schedule, confidence
        self.longest = heads.length if num_tokens is None else num_tokens
        self.guess_seconds = 0.0

    def start(self, run: Run) -> None:
        output = run.model.get_output_embeddings()
        assert isinstance(output, nn.Module) and run.model.generation_config is not None
        weight = cast(Tensor, output.weight)
        hidden, tokens = self.heads.hidden_size, int(self.heads.draft_ids.max()) + 1
        if weight.shape[1] != hidden or weight.shape[0] < tokens:
            raise ConfigurationError(
                f"the heads fit a model with {hidden} hidden units and {tokens} or more tokens, this one has "
                f"{weight.shape[1]} and {weight.shape[0]}; pass heads trained for it"
            )
        self.run = run
        self.heads.to(weight.device, weight.dtype)
        self.rows = weight[self.heads.draft_ids]  # (draft vocabulary, hidden)
        self.vocabulary = weight.shape[0]
        self.last = {*eos_token_ids(run.model.generation_config), run.config.fork_token_id}
        self.places: dict[tuple[int, int], int] = {}

    def observe(self, threads: Sequence[tuple[int, Thread]], states: Tensor) -> None:
        self.places = {(number, thread.index): place for place, (number, thread) in enumerate(threads)}
        self.states = states

    def seconds(self, length: int, threads: int) -> float:
        return length * self.guess_seconds

    @torch.no_grad()
    def propose(self, rows: Sequence[GrowingTree], limits: Sequence[Sequence[int]]) -> Sequence[Sequence[Draft]]:
        drafts: dict[tuple[int, int], list[int]] = {}
        going = []
        for number, (row, lengths) in enumerate(zip(rows, limits, strict=True)):
            for thread, length in zip(row.live, lengths, strict=True):
                drafts[number, thread.index] = []
                if length and (number, thread.index) in self.places:
                    going.append((number, thread, length))
        if going:
            self._guess(rows, going, drafts)
        return [[Draft(drafts[number, thread.index]) for thread in row.live] for number, row in enumerate(rows)]

    def _guess(
        self,
        rows: Sequence[GrowingTree],
        going: list[tuple[int, Thread, int]],
        drafts: dict[tuple[int, int], list[int]],
    ) -> None:
        state = self.states[[self.places[number, thread.index] for number, thread, _ in going]]  # (threads, hidden)
        tokens = [thread.path_ids[-1] for _, thread, _ in going]
        embeddings = self.run.model.get_input_embeddings()
        start, guesses = time.perf_counter(), 0
        while going:
            embedded = embeddings(torch.tensor(tokens, device=self.rows.device))
            state = self.heads(state, embedded.to(state.dtype))
            found, sure = self._best(state, rows, going, drafts)
            guesses, keep = guesses + 1, []
            for place, (number, thread, length) in enumerate(going):
                if sure[place] >= self.confidence:
                    draft = drafts[number, thread.index]
                    draft.append(found[place])
                    if len(draft) < length and found[place] not in self.last:
                        keep.append(place)
            state, going, tokens = state[keep], [going[place] for place in keep], [found[place] for place in keep]
        spent = (time.perf_counter() - start) / guesses
        self.guess_seconds = min(spent, 0.9 * self.guess_seconds + 0.1 * spent) if self.guess_seconds else spent

    def _best(
        self,
        state: Tensor,
        rows: Sequence[GrowingTree],
        going: Sequence[tuple[int, Thread, int]],
        drafts: dict[tuple[int, int], list[int]],
    ) -> tuple[list[int], list[float]]:
        """Return the likeliest guess of each thread and its probability."""
        guesses = functional.linear(state, self.rows).float()  # (threads, draft vocabulary)
        scores = guesses.new_full((len(going), self.vocabulary), -torch.inf)
        scores[:, self.heads.draft_ids] = guesses
        contexts = [
            self.run.context(number, rows[number], thread, drafts[number, thread.index]) for number, thread, _ in going
        ]
        best = self.run.sampler.scores(scores, contexts).max(dim=-1)
        if not self.confidence:
            return best.indices.tolist(), [1.0] * len(going)
        return best.indices.tolist(), (best.values - guesses.logsumexp(dim=-1)).exp().tolist()


def path_successors(input_ids: Sequence[int], visible_until: Sequence[int], child_id: int) -> list[int]:
    """Return where each token's thread goes on in a row of trees in depth-first order, -1 at its end.

    >>> path_successors([5, 1, 2, 7, 6], [5, 5, 4, 4, 5], child_id=2)  # 5 [Fork] ([Child] 7) 6
    [1, 4, 3, -1, -1]
    """
    following = []
    for index, until in enumerate(visible_until):
        after = index + 1
        if after < until and input_ids[after] == child_id:
            after = visible_until[after]
        following.append(after if after < until else -1)
    return following
