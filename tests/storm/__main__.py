"""``python -m storm``: all storms, or those that are named, for some minutes; goes on where the last call stopped."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from storm import commands, doors, exactness, faults, files, growth, memory, proxied, scripted, shown, texts
from storm.storms import Storm, mended, run

STORMS: tuple[Storm, ...] = (
    exactness.STORM, scripted.STORM, *texts.STORMS, growth.STORM, growth.FAR_STORM, files.STORM, doors.STORM,
    shown.STORM, memory.STORM, faults.STORM, commands.STORM, proxied.STORM,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run the storms; return 1 if a failure is left that is not mended."""
    parser = argparse.ArgumentParser("storm", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(one.name for one in STORMS)}; all by default")
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("STORM_MINUTES") or 30))
    parser.add_argument("--folder", type=Path, default=Path("build/storm"), help="of the records, which are gone on with")
    asked = parser.parse_args(arguments)
    if unknown := {*asked.names} - {one.name for one in STORMS}:
        parser.error(f"there is no storm called {', '.join(sorted(unknown))}")
    asked.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    chosen = [one for one in STORMS if not asked.names or one.name in asked.names]
    rows, left = ["| storm | tried | parts | failed | kinds of failure | mended |", "|---|---:|---:|---:|---:|---:|"], 0
    for storm in chosen:
        seconds = 60 * asked.minutes * storm.share / sum(one.share for one in chosen)
        tally = run(storm, asked.folder, seconds, say)
        whole = mended(storm, tally)
        left += len(tally.failures) - whole
        counts = (tally.tried, tally.parts, tally.failed, len(tally.failures), whole)
        rows.append(f"| {storm.name} | {' | '.join(f'{count:,}' for count in counts)} |")
    say("\n".join(rows))
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
