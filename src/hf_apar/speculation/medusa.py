"""Medusa heads: small layers on the model's last hidden state that guess the tokens after the next one.

Source: Medusa (Cai et al., 2024), with the heads in sequence (Hydra, Ankner et al., 2024): each guess also sees the tokens
guessed before it. One cell serves every place, and the guesses are scored by rows of the model's own output layer: those of
the most frequent tokens (FR-Spec, Zhao et al., 2025), so that a guess costs little beside a step.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_apar.choice.paths import Context
from hf_apar.errors import ConfigurationError
from hf_apar.protocol import ThreadView
from hf_apar.speculation.proposer import Draft, Proposer, RowView, Run

LEAST_CHANCE = 0.15  # of being kept, for a guess to be made: what a token more costs a narrow step, at least in float32
HEADS_FILE = "medusa.safetensors"
HEADS_FOLDER = "heads"
"""Where the heads of a whole checkpoint lie: engines take any safetensors file beside its config for the model."""


def heads_in(folder: Path) -> Path | None:
    """Return the file of the heads that lie in ``folder``, with an adapter or with a whole checkpoint, if any do."""
    return next((file for file in (folder / HEADS_FILE, folder / HEADS_FOLDER / HEADS_FILE) if file.is_file()), None)


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
            ConfigurationError: if ``folder`` holds no heads, or others than :meth:`save` writes.
        """
        from safetensors import safe_open

        if (found := heads_in(folder)) is None:
            raise ConfigurationError(f"{folder} has no {HEADS_FILE}; give a folder that hf-apar train-medusa wrote")
        try:
            with safe_open(found, framework="pt") as file:
                settings = json.loads(file.metadata()["medusa"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            inner, doubled = tensors["gate.weight"].shape
            heads = cls(doubled // 2, inner, tensors["draft_ids"], int(settings["length"]))
            heads.load_state_dict(tensors)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ConfigurationError(f"{found} holds no heads as hf-apar train-medusa writes them: {error}") from error
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ConfigurationError(f"{found} has values that are no numbers; train the heads again")
        return heads


@dataclass(frozen=True)
class _Node:
    """A guess that others may follow: its thread, its index in the draft, -1 for the path, and the guesses up to it."""

    number: int
    thread: ThreadView
    index: int
    guesses: Sequence[int]
    chance: float

    @property
    def key(self) -> tuple[int, int]:
        return self.number, self.thread.index


class MedusaDrafts(Proposer):
    """Proposes small trees of what ``heads`` guess, as long as they give a guess a chance that pays.

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

    def __init__(
        self,
        heads: MedusaHeads,
        *,
        depth: int | None = None,
        branches: int = 3,
        beam: int = 4,
        schedule: str = "constant",
    ) -> None:
        self.heads, self.branches, self.schedule = heads, branches, schedule
        self.depth = heads.length if depth is None else depth
        if self.depth < 1 or branches < 1:
            raise ConfigurationError(f"depth is {self.depth} and branches {branches}; both must be 1 or more")
        self.beam = 1 if branches == 1 else max(beam, 1)
        self.longest = self.depth * self.beam

    def start(self, run: Run) -> None:
        output = run.model.get_output_embeddings()
        assert isinstance(output, nn.Module)
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
        rows = nn.Parameter(weight[self.heads.draft_ids], requires_grad=False)
        self.output = nn.Linear(hidden, len(rows), bias=False, device="meta")
        self.output.weight = rows  # (draft vocabulary, hidden)
        self.layers = nn.ModuleList([self.heads, self.output])
        self.ids = self.heads.draft_ids.tolist()
        self.places = torch.full((weight.shape[0] + 1,), len(self.ids), device=weight.device)  # of each token among those
        self.places[self.heads.draft_ids] = torch.arange(len(self.ids), device=weight.device)
        self.columns = {token: column for column, token in enumerate(self.ids)}
        self.seen: dict[tuple[int, int], int] = {}

    def observe(self, threads: Sequence[tuple[int, ThreadView]], states: Tensor) -> None:
        self.seen = {(number, thread.index): place for place, (number, thread) in enumerate(threads)}
        self.states = states

    @torch.no_grad()
    def propose(self, rows: Sequence[RowView], limits: Sequence[Sequence[int]]) -> Sequence[Sequence[Draft]]:
        trees = [[_Tree(limit) for limit in lengths] for lengths in limits]
        drafts, nodes = dict[tuple[int, int], _Tree](), []
        for number, (row, made) in enumerate(zip(rows, trees, strict=True)):
            for thread, tree in zip(row.live, made, strict=True):
                if tree.most and (number, thread.index) in self.seen:
                    drafts[number, thread.index] = tree
                    nodes.append(_Node(number, thread, -1, (), 1.0))
        if nodes:
            self._grow(rows, nodes, drafts)
        return [[Draft(tree.tokens, tree.parents) for tree in made] for made in trees]

    def _grow(self, rows: Sequence[RowView], nodes: Sequence[_Node], drafts: Mapping[tuple[int, int], "_Tree"]) -> None:
        """Grow the drafts by one guess in a row after the other, all of them together."""
        states = self.states[[self.seen[node.key] for node in nodes]].to(self.output.weight)  # (nodes, hidden)
        for _ in range(self.depth):
            contexts = [self.run.context(node.number, rows[node.number], node.thread, node.guesses) for node in nodes]
            states, guesses = self._guess(nodes, states, contexts)
            found: dict[tuple[int, int], list[tuple[float, int, int]]] = {}
            for place, node in enumerate(nodes):
                for chance, token in guesses[place]:
                    if node.chance * chance >= LEAST_CHANCE:
                        found.setdefault(node.key, []).append((node.chance * chance, place, token))
            following, parents = [], []
            for key, likely in found.items():
                for chance, place, token in sorted(likely, reverse=True)[: self.beam]:
                    node = nodes[place]
                    index = drafts[key].add(token, node.index)
                    if index is not None and not self.run.is_last(node.thread, token):
                        following.append(_Node(node.number, node.thread, index, (*node.guesses, token), chance))
                        parents.append(place)
            if not following:
                break
            nodes, states = following, states[parents]

    def _guess(
        self, nodes: Sequence[_Node], states: Tensor, contexts: Sequence[Context]
    ) -> tuple[Tensor, list[list[tuple[float, int]]]]:
        """Return the states after ``nodes``, (nodes, hidden), and what may follow each: (chance, token), likeliest first."""
        tokens = [node.guesses[-1] if node.guesses else node.thread.path_ids[-1] for node in nodes]
        embedded = self.run.model.get_input_embeddings()(torch.tensor(tokens, device=self.run.device))
        states = self.heads(states, embedded.to(self.output.weight))
        logits = self.output(states).float()  # (nodes, draft vocabulary)
        chances = self.run.sampler.guess_scores(logits, self.places, self.columns, contexts).softmax(dim=-1)
        best, which = chances.topk(min(self.branches, len(self.ids)))
        both = torch.stack([best, which.float()], dim=-1).tolist()  # one copy to the host; columns are below 2**24
        return states, [[(chance, self.ids[int(column)]) for chance, column in one] for one in both]


class _Tree:
    """A draft that grows."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.tokens: list[int] = []
        self.parents: list[int] = []

    def add(self, token: int, parent: int) -> int | None:
        """Add a guess after that of index ``parent``; return its index, ``None`` if the draft is full."""
        if len(self.tokens) == self.most:
            return None
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1
