"""What answers are noted to be made on."""

import platform

import pytest

from hf_apar.evaluation import machine


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 9R14 \nmodel name\t: another\n", "AMD EPYC 9R14"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_the_processor_by_name(tmp_path, monkeypatch, told, name):
    if told is not None:
        (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.processor() == machine.surroundings()["machine"] == name
