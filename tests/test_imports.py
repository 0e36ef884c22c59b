"""Imports point one way, and importing the package stays cheap and has no side effects on optional back ends."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "hf_apar"

# From the ground up: a module may import what stands before it in this list, and its own part; nothing imports the CLI.
ORDER = (
    "releases", "errors", "prepacking", "processes", "config", "protocol", "generation_settings", "tokens", "text", "tree",
    "streaming", "replay", "notebook", "forward", "checks", "choice", "speculation", "results", "decoding", "generation",
    "enabling", "branches", "checkpoints", "data", "training", "serving", "evaluation", "probing", "cli",
)  # fmt: skip


def module_name(file: Path) -> str:
    parts = ("hf_apar", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part(module: str) -> str:
    """Return the part of the package that ``module`` belongs to: ``hf_apar.data.distillation.distill`` to ``data``."""
    return module.split(".")[1] if "." in module else ""


def type_checking_lines(tree: ast.Module) -> set[int]:
    """Return the lines under ``if TYPE_CHECKING``: they run never, so they bind nothing."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def imported_modules(file: Path) -> set[str]:
    """Return the modules of the package that ``file`` imports, at its top or inside a function."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    unseen = type_checking_lines(tree)
    package = module_name(file).split(".")[: None if file.name == "__init__.py" else -1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if getattr(node, "lineno", None) in unseen:
            continue
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update({module} if module != "hf_apar" else {f"hf_apar.{name.name}" for name in node.names})
    return {module for module in found if module.split(".")[0] == "hf_apar"}


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(file):
    own = ORDER.index(part(module_name(file)))
    if ORDER[own] == "cli":
        return
    later = {module for module in imported_modules(file) if part(module) in ORDER and ORDER.index(part(module)) > own}
    assert not later, f"{module_name(file)} imports what is built upon it: {sorted(later)}"


def test_importing_the_package_loads_no_optional_back_end():
    code = "import sys, hf_apar; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"typer", "rich", "peft", "datasets", "markdown_it", "sentencex", "gguf", "vllm"} & set(loaded)


# The two ids of the control tokens are a checkpoint's business and training's: all else asks the ForkProtocol.
KNOW_THE_IDS = {
    "config", "protocol", "tokens", "training.rows.features", "training.fine_tuning", "training.lora", "training.metrics",
}  # fmt: skip


def test_few_modules_know_the_ids_of_the_control_tokens():
    ids = re.compile(r"\b(fork_token_id|child_token_id|fork_id|child_id|FORK_TOKEN|CHILD_TOKEN)\b")
    found = {module_name(file).partition(".")[2] for file in FILES if ids.search(file.read_text(encoding="utf-8"))}
    assert found == KNOW_THE_IDS


def test_the_order_names_what_there_is_and_nothing_else():
    assert {part(module_name(file)) for file in FILES} == set(ORDER)


def test_a_public_name_means_one_thing():
    """A class or function of one name in two modules is two things to a reader."""
    homes = defaultdict(set)
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(module_name(file))
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}
