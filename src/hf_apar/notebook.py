"""An answer in a notebook while its threads write it (needs IPython, which notebooks have)."""

import time
from collections.abc import Sequence

from hf_apar.errors import MissingPackageError
from hf_apar.streaming import AparStreamer
from hf_apar.tree.display import tree_html
from hf_apar.tree.threads import Decodes, ParagraphTree


class NotebookStreamer(AparStreamer):
    """A streamer that shows one answer below the cell: each thread on a tint, with a cursor where it writes.

    Args:
        tokenizer: turns tokens into text.
        row: which answer of a batch.
        refresh_seconds: shortest time between two pictures: drawing must not slow the decoding down.

    Raises:
        MissingPackageError: if IPython is not installed.
    """

    def __init__(self, tokenizer: Decodes, *, row: int = 0, refresh_seconds: float = 0.2) -> None:
        try:
            from IPython.display import HTML, display
        except ModuleNotFoundError as error:
            raise MissingPackageError("NotebookStreamer shows answers in notebooks, and IPython is not installed") from error
        self.tokenizer, self.row, self.refresh_seconds = tokenizer, row, refresh_seconds
        self._html, self._place = HTML, display(HTML(""), display_id=True)
        self._tree: ParagraphTree | None = None
        self._drawn = 0.0

    def end_step(self, trees: Sequence[ParagraphTree]) -> None:
        self._tree = trees[self.row]
        if time.monotonic() - self._drawn >= self.refresh_seconds:
            self._draw()

    def end(self) -> None:
        self._draw()

    def _draw(self) -> None:
        if self._tree is not None and self._place is not None:  # outside of notebooks there is no place to draw over
            self._place.update(self._html(tree_html(self._tree, self.tokenizer)))
            self._drawn = time.monotonic()
