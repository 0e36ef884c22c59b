"""Medusa heads: small layers on the model's last hidden state that guess the tokens after the next one.

Source: Medusa (Cai et al., 2024), with the heads in sequence (Hydra, Ankner et al., 2024): each guess also sees the tokens
guessed before it. One cell serves every place, and the guesses are scored by rows of the model's own output layer: those of
the most frequent tokens (FR-Spec, Zhao et al., 2025), so that a guess costs little beside a step.
"""

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_apar.errors import ConfigurationError
from hf_apar.generation_settings import eos_token_ids
from hf_apar.speculation.proposer import Draft, Proposer, Run
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Thread

_FADING = 0.6  # about what a further guess in a row gains, of what the one before it gained
WORTHLESS = 0.02  # guesses with less of a chance to be kept are not made
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


@dataclass(frozen=True)
class _Node:
    """A guess that others may follow: its thread, its index in the draft, -1 for the path, and the guesses up to it."""

    number: int
    thread: Thread
    index: int
    guesses: Sequence[int]
    worth: float


class MedusaDrafts(Proposer):
    """Proposes small trees of what ``heads`` guess, with the chance that they give each guess.

    The guesses meet the same repetition penalty and bias of [Fork] as the model's choice. A thread that has just begun has
    no state yet, and no draft in its first step.

    Args:
        heads: trained for the model that decodes; they take its device and number format.
        depth: the most guesses in a row; by default as many as the heads were trained for.
        branches: how many guesses may follow the same one; 1 for chains.
        beam: of the guesses at one depth of a draft so many are kept, the likeliest.
        schedule: see :class:`~hf_apar.speculation.proposer.Proposer`.
    """

    watches = True
    estimates = True

    def __init__(
        self,
        heads: MedusaHeads,
        *,
        depth: int | None = None,
        branches: int = 3,
        beam: int = 4,
        schedule: str | None = None,
    ) -> None:
        self.heads, self.branches, self.beam, self.schedule = heads, branches, max(beam, 1), schedule
        self.depth = heads.length if depth is None else depth
        if self.depth < 1 or branches < 1:
            raise ConfigurationError(f"depth is {self.depth} and branches {branches}; both must be 1 or more")
        self.longest = self.depth * (1 if branches == 1 else self.beam)
        self.guess_seconds: deque[float] = deque(maxlen=32)

    def start(self, run: Run) -> None:
        output = run.model.get_output_embeddings()
        assert isinstance(output, nn.Module) and run.model.generation_config is not None
        weight = cast(Tensor, output.weight)
        if weight.is_meta or not weight.is_floating_point() or type(weight.data) is not Tensor:
            raise ConfigurationError(
                "Medusa heads need the model's output layer whole, in memory and not quantised; keep lm_head out of "
                "offloading, quantisation and tensor parallelism, or choose another proposer"
            )
        hidden, tokens = self.heads.hidden_size, int(self.heads.draft_ids.max()) + 1
        if weight.shape[1] != hidden or weight.shape[0] < tokens:
            raise ConfigurationError(
                f"the heads fit a model with {hidden} hidden units and {tokens} or more tokens, this one has "
                f"{weight.shape[1]} and {weight.shape[0]}; pass heads trained for it"
            )
        self.run = run
        self.heads.to(weight.device, weight.dtype)
        self.rows = weight[self.heads.draft_ids]  # (draft vocabulary, hidden)
        self.ids = self.heads.draft_ids.tolist()
        self.places = torch.full(
            (weight.shape[0],), len(self.ids), device=weight.device
        )  # of each token in the draft vocabulary
        self.places[self.heads.draft_ids] = torch.arange(len(self.ids), device=weight.device)
        self.last = {*eos_token_ids(run.model.generation_config), run.config.fork_token_id}
        self.seen: dict[tuple[int, int], int] = {}

    def observe(self, threads: Sequence[tuple[int, Thread]], states: Tensor) -> None:
        self.seen = {(number, thread.index): place for place, (number, thread) in enumerate(threads)}
        self.states = states

    @torch.no_grad()
    def propose(self, rows: Sequence[GrowingTree], limits: Sequence[Sequence[int]]) -> Sequence[Sequence[Draft]]:
        drafts: dict[tuple[int, int], _Tree] = {}
        nodes = []
        for number, (row, lengths) in enumerate(zip(rows, limits, strict=True)):
            for thread, length in zip(row.live, lengths, strict=True):
                drafts[number, thread.index] = _Tree(length)
                if length and (number, thread.index) in self.seen:
                    nodes.append(_Node(number, thread, -1, (), 1.0))
        if nodes:
            self._guess(rows, nodes, drafts)
        return [[drafts[number, thread.index].draft() for thread in row.live] for number, row in enumerate(rows)]

    def _guess(self, rows: Sequence[GrowingTree], nodes: list[_Node], drafts: Mapping[tuple[int, int], "_Tree"]) -> None:
        """Grow the drafts by one guess in a row after the other, all of them together."""
        places = [self.seen[node.number, node.thread.index] for node in nodes]
        states = self.states[places].to(self.rows)  # (nodes, hidden)
        embeddings = self.run.model.get_input_embeddings()
        expected, width = float(len(nodes)), len(nodes)
        least = max(WORTHLESS, self.run.least_worth(width))
        for _ in range(self.depth):
            start = time.perf_counter()
            tokens = [node.guesses[-1] if node.guesses else node.thread.path_ids[-1] for node in nodes]
            embedded = embeddings(torch.tensor(tokens, device=self.run.device))
            states = self.heads(states, embedded.to(self.rows))
            contexts = [self.run.context(node.number, rows[node.number], node.thread, node.guesses) for node in nodes]
            guesses = functional.linear(states, self.rows).float()  # (nodes, draft vocabulary)
            scores = self.run.sampler.guess_scores(guesses, self.places, contexts)
            best = scores.softmax(dim=-1).topk(min(self.branches, len(self.ids)))
            found: dict[tuple[int, int], list[tuple[float, int, int]]] = {}
            for place, (node, chances, ids) in enumerate(zip(nodes, *best_lists(best), strict=True)):
                for chance, which in zip(chances, ids, strict=True):
                    if (worth := node.worth * chance) >= least:
                        found.setdefault((node.number, node.thread.index), []).append((worth, place, self.ids[which]))
            following, parents = [], []
            for key, guessed in found.items():
                for worth, place, token in sorted(guessed, reverse=True)[: self.beam if self.branches > 1 else 1]:
                    node = nodes[place]
                    index = drafts[key].add(token, node.index, worth)
                    if index is not None and token not in self.last:
                        following.append(_Node(node.number, node.thread, index, (*node.guesses, token), worth))
                        parents.append(place)
            gain = sum(node.worth for node in following)
            expected, width = expected + gain, width + len(following)
            self.guess_seconds.append(time.perf_counter() - start)
            if not following or not self._pays(gain, expected, width):
                break
            nodes, states = following, states[parents]

    def _pays(self, gain: float, expected: float, width: int) -> bool:
        """Is one more guess in a row worth its time, where the last one's gain was ``gain``?"""
        if self.run.seconds is None:
            return True
        share = median(self.guess_seconds) / self.run.seconds(width)
        return _FADING * gain > share * expected


class _Tree:
    """A draft that grows."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.worth: list[float] = []

    def add(self, token: int, parent: int, worth: float) -> int | None:
        """Add a guess after that of index ``parent``; return its index, ``None`` if the draft is full."""
        if len(self.tokens) == self.most:
            return None
        self.tokens.append(token)
        self.parents.append(parent)
        self.worth.append(worth)
        return len(self.tokens) - 1

    def draft(self) -> Draft:
        return Draft(self.tokens, self.parents, self.worth)


def best_lists(best: "torch.return_types.topk") -> tuple[list[list[float]], list[list[int]]]:
    """Return values and indices of a top-k, (rows, k), as lists: two copies to the host."""
    return best.values.tolist(), best.indices.tolist()
