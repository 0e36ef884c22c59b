"""FIELD T12: what was made is not made again, unless it was made with something else; then it is told by name."""

import pytest

from hf_apar.cli.stages import Stages
from hf_apar.errors import ConfigurationError

ONE, TWO = {"size": 1, "model": None}, {"size": 2, "model": None}


def run(folder, first, second, restart=False, text=None, fails=()):
    """Make two stages, the second from the file of the first; return the names of those that were made."""
    files = {"first": folder / "first.txt", "second": folder / "under" / "second.txt"}
    stages = Stages(folder, {name: [file] for name, file in files.items()}, restart=restart)
    made = []
    for name, settings in (("first", first), ("second", second)):
        with stages.stage(name, settings, [] if name == "first" else [files["first"]]) as wanted:
            if wanted:
                made.append(name)
                files[name].parent.mkdir(exist_ok=True)
                files[name].write_text(text or f"{name} {settings}")
                if name in fails:
                    raise OSError("the disk is full")
    return made


def test_t12_a_stage_is_made_once(tmp_path):
    assert run(tmp_path, ONE, ONE) == ["first", "second"]
    assert run(tmp_path, ONE, ONE) == []
    assert run(tmp_path, ONE, ONE, restart=True) == []
    (tmp_path / "under" / "second.txt").unlink()
    assert run(tmp_path, ONE, ONE) == ["second"]


def test_t12_other_settings_are_refused_by_name(tmp_path):
    run(tmp_path, ONE, ONE)
    with pytest.raises(ConfigurationError, match=r"the stage second in .* was made with size 1 \(now 2\); .*--restart"):
        run(tmp_path, ONE, TWO)
    with pytest.raises(ConfigurationError, match=r"the stage first"):
        run(tmp_path, TWO, TWO)
    assert run(tmp_path, ONE, ONE) == []
    assert run(tmp_path, ONE | {"new": None, "off": False}, ONE) == [], "options of a later release that are not used"


def test_t12_what_changed_and_all_after_it_is_made_again_and_the_old_is_kept(tmp_path):
    run(tmp_path, ONE, ONE)
    old = {name: (tmp_path / name).read_text() for name in ("first.txt", "under/second.txt")}
    assert run(tmp_path, ONE, TWO, restart=True) == ["second"]
    assert (tmp_path / "before-1" / "under" / "second.txt").read_text() == old["under/second.txt"]
    assert run(tmp_path, TWO, TWO, restart=True) == ["first", "second"]
    assert (tmp_path / "before-2" / "first.txt").read_text() == old["first.txt"]
    assert run(tmp_path, TWO, TWO) == []


def test_what_a_stage_goes_on_from_is_neither_refused_nor_moved(tmp_path):
    """A penalty of decoding, or more steps, cost the hours that the adapter had taken."""

    def made(settings, goes_on):
        stages = Stages(tmp_path, {"only": [tmp_path / "only.txt"]}, restart=False)
        with stages.stage("only", settings, goes_on=goes_on) as wanted:
            if wanted:
                (tmp_path / "only.txt").write_text("here")
        return wanted

    assert made(ONE, {"steps": 3}) and not made(ONE, {"steps": 3})
    assert made(ONE, {"steps": 9}) and not made(ONE, {"steps": 9})
    assert made(ONE, {"steps": 9, "penalty": 1.1})
    with pytest.raises(ConfigurationError, match=r"made with size 1 \(now 2\); go on"):
        made(TWO, {"steps": 12, "penalty": 1.1})
    assert not list(tmp_path.glob("before-*"))


def test_an_input_that_an_earlier_release_did_not_note_is_no_other_one(tmp_path):
    for inputs in ([], [tmp_path / "input.txt"]):
        for path in inputs:
            path.write_text("new")
        with Stages(tmp_path, {"only": [tmp_path / "only.txt"]}, restart=False).stage("only", ONE, inputs) as wanted:
            assert wanted is not bool(inputs)
            (tmp_path / "only.txt").write_text("here")


def test_t12_the_content_of_the_input_counts(tmp_path):
    run(tmp_path, ONE, ONE)
    (tmp_path / "first.txt").write_text("edited by hand")
    with pytest.raises(
        ConfigurationError, match=r"the stage second .* made with first\.txt \w{8}\.\.\. \(now \w{8}\.\.\.\)"
    ):
        run(tmp_path, ONE, ONE)
    assert run(tmp_path, ONE, ONE, restart=True) == ["second"]


def test_a_stage_that_failed_goes_on_with_the_same_settings_alone(tmp_path):
    with pytest.raises(OSError, match="full"):
        run(tmp_path, ONE, ONE, fails=("second",))
    with pytest.raises(ConfigurationError, match="the stage second"):
        run(tmp_path, ONE, TWO)
    assert run(tmp_path, ONE, ONE, restart=True) == ["second"]
    assert not (tmp_path / "before-1").exists(), "it had begun with these settings"


def test_what_lies_there_from_elsewhere_is_gone_on_with_or_moved_aside(tmp_path):
    (tmp_path / "first.txt").write_text("mine")
    assert run(tmp_path, ONE, ONE) == ["first", "second"]
    (tmp_path / "recipe.json").write_text("{broken")
    assert run(tmp_path, ONE, ONE, restart=True) == ["first", "second"]
    assert (tmp_path / "before-1" / "first.txt").exists() and (tmp_path / "before-1" / "under" / "second.txt").exists()
