"""Text at the bottom of a terminal that is drawn over while it changes."""

from rich.cells import chop_cells
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text


class Picture:
    """The last lines of a text that fit the terminal, broken between words; each picture takes the place of the one before.

    Terminals break the lines that they show when they become narrower; so what has to be erased is counted in the width of
    now. A terminal that cuts lines instead loses some lines above the picture then.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown: list[str] = []

    def draw(self, text: Text) -> None:
        """Show ``text`` in place of what was drawn last."""
        lines = text.wrap(self.console, self.console.width)[-max(self.console.height - 1, 1) :]
        with self.console.capture() as drawn:
            self._clear()
            self.console.show_cursor(False)
            self.console.print(Text("\n").join(lines), end="")
        self.console.file.write(drawn.get())  # one write: nothing flickers, and Ctrl-C comes before it or after it
        self.console.file.flush()
        self._shown = [line.plain for line in lines]

    def erase(self) -> None:
        """Leave the place as it was before the first picture."""
        if self._shown:
            with self.console:
                self._clear()
                self.console.show_cursor(True)
            self._shown = []

    def _clear(self) -> None:
        rows = sum(max(len(chop_cells(line, self.console.width)), 1) for line in self._shown)
        erase = (ControlType.ERASE_IN_LINE, 2)
        upwards = [(ControlType.CURSOR_UP, 1), erase] * (rows - 1)
        if rows:
            self.console.control(Control(ControlType.CARRIAGE_RETURN, erase, *upwards))
