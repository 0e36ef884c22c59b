"""Installs the wheel as the README says, into an environment that has nothing else, and runs the README there.

What pip resolves today is what is tested, not what a lock file names: ``python tests_wheel/readme.py WHEEL ENVIRONMENT``.
"""

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"  # given beside the line, since what pip takes by itself depends on the machine
_BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, title: str) -> list[tuple[str, str]]:
    """Return language and text of the code blocks under the heading ``title`` of ``page``."""
    section = (ROOT / page).read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [(block["language"], block["text"]) for block in _BLOCK.finditer(section)]


def run(arguments: list[str], folder: str, **options: object) -> None:
    print("$", shlex.join(arguments)[:160], flush=True)
    subprocess.run(arguments, cwd=folder, check=True, stdin=subprocess.DEVNULL, **options)


def main(wheel: Path, environment: Path) -> None:
    python, (_, install) = str(environment / "bin" / "python"), blocks("README.md", "Install")[0]
    with tempfile.TemporaryDirectory() as folder:  # the checkout is out of sight
        for line in filter(None, install.splitlines()):
            words = shlex.split(line, comments=True)
            assert words[:2] == ["pip", "install"], line
            places = [place for place, word in enumerate(words) if word.startswith(".[")]
            if places:
                words[places[0]] = f"{wheel}{words[places[0]][1:]}"
                words = [*words, TORCH]
            run([python, "-m", *words, "--quiet"], folder)
        snippets = "\n".join(text for language, text in blocks("README.md", "Use") if language == "python")
        run([python, "-c", snippets], folder)
        commands = [*blocks("README.md", "Use"), blocks("docs/index.md", "The command line")[0]]
        for line in "\n".join(text for language, text in commands if not language).splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["hf-apar"] and not {"--model", "..."} & set(words):  # those that name nothing of the user's
                run([str(environment / "bin" / "hf-apar"), *words[1:]], folder)
    print("the README runs in what pip installs")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
