"""The reference of the web site has all that a reader is told to import, and what is published names one version."""

import re
import tomllib
from pathlib import Path

import hf_apar

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
ENTRIES = re.findall(r"^::: (\S+)$", "\n".join(page.read_text(encoding="utf-8") for page in PAGES), re.MULTILINE)
IMPORT = re.compile(r"\bfrom (hf_apar(?:\.\w+)+) import")


def test_the_reference_has_each_public_name_once():
    names = [entry.split(".")[1] for entry in ENTRIES if entry.count(".") == 1]
    assert sorted(set(names) - {"notebook", "protocol", "replay", "tokens"}) == sorted(hf_apar.__all__)
    assert len(ENTRIES) == len(set(ENTRIES))


def test_the_reference_has_each_module_that_a_page_or_example_imports():
    told = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    modules = {name for page in told for name in IMPORT.findall(page.read_text(encoding="utf-8"))}
    assert sorted(modules - set(ENTRIES)) == []


def test_the_index_of_the_examples_has_each_of_them():
    index = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|", index, re.MULTILINE)
    assert listed == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_the_changelog_and_the_citation_have_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    sections = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version in sections[:2] and sections[0] in ("Unreleased", version)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
