"""Stages that follow each other, each of which knows what its output was made with."""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

from hf_apar.checkpoints.made_with import differences, digest, note, noted
from hf_apar.errors import ConfigurationError


class Stages:
    """The stages of one recipe in a folder, and a file there that tells what each was made with.

    A stage that was made with the same settings from the same inputs is not made again. With other ones it is refused by
    the names of those that differ, or, with ``restart``, made again with all that come after it; what there was is moved
    aside.

    Args:
        folder: holds all outputs.
        outputs: what each stage writes, in the order of the stages; without the first of these it is not made.
        restart: make again what was made with other settings.
    """

    def __init__(self, folder: Path, outputs: Mapping[str, Sequence[Path]], *, restart: bool) -> None:
        self.folder, self.outputs, self.restart = folder, outputs, restart
        self.file = folder / "recipe.json"
        self.known = noted(self.file) or {}

    @contextmanager
    def stage(
        self, name: str, settings: Mapping[str, object], inputs: Sequence[Path] = (), *, goes_on: Mapping[str, object] = {}
    ) -> Iterator[bool]:
        """Say whether the stage ``name`` is to be made, and note that it is once the ``with`` block ends without an error.

        Args:
            goes_on: settings with other values of which it is made again where it lies: it goes on from what is there.

        Raises:
            ConfigurationError: if it was made, or begun, with other ``settings`` or ``inputs``, without ``restart``.
        """
        wanted = {**settings, **{path.name: digest(path) for path in inputs}}
        made = self._made(name, wanted, goes_on, {path.name for path in inputs})
        if not made:
            self._note(name, {**wanted, **goes_on}, done=False)
        yield not made
        if not made:
            self._note(name, {**wanted, **goes_on}, done=True)

    def _made(self, name: str, wanted: Mapping[str, object], goes_on: Mapping[str, object], inputs: Set[str]) -> bool:
        """Is a stage made as it is ``wanted``? An earlier release may not have noted all of its ``inputs``."""
        record = self.known.get(name)
        if not isinstance(record, dict):
            if self.restart:
                self._set_aside(name)
            return False
        before = {setting: value for setting, value in record["made_with"].items() if setting not in goes_on}
        wanted = {setting: value for setting, value in wanted.items() if setting in before or setting not in inputs}
        if other := differences(before, wanted):
            if not self.restart:
                raise ConfigurationError(
                    f"the stage {name} in {self.folder} was made with {', '.join(other.values())}; go on with that, name "
                    "another --output, or make it and all after it again with --restart"
                )
            self._set_aside(name)
            return False
        same = not differences(record["made_with"], {**wanted, **goes_on})
        return same and bool(record["done"]) and self.outputs[name][0].exists()

    def _note(self, name: str, wanted: Mapping[str, object], *, done: bool) -> None:
        self.known[name] = {"done": done, "made_with": dict(wanted)}
        note(self.file, self.known)

    def _set_aside(self, name: str) -> None:
        """Move what the stage ``name`` and those after it have written into a folder of its own, and forget them."""
        names = list(self.outputs)
        later = names[names.index(name) :]
        there = [path for each in later for path in self.outputs[each] if path.exists()]
        number = 1
        while (aside := self.folder / f"before-{number}").exists():
            number += 1
        for path in there:
            if path.exists():  # a folder that was moved took it along
                target = aside / path.relative_to(self.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        for each in later:
            self.known.pop(each, None)
        note(self.file, self.known)
