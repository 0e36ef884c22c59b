"""The soak of the proxy, seconds of it, and what it calls growth."""

import json

import pytest

from storm.soak import GROWTH, grown, soak


def test_a_proxy_holds_after_its_load_what_it_held_before(tmp_path):
    samples = soak(1, tmp_path / "soak.jsonl", minute=8.0)
    assert [json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines()] == samples
    before, after = samples
    assert after["requests"] >= 4 and after["tasks"] == before["tasks"] and after["files"] <= before["files"] + 2


@pytest.mark.parametrize(("last", "said"), [
    ({}, None), ({"memory": GROWTH + 9}, None), ({"memory": GROWTH + 10}, "grown by 16 MiB since minute 1"),
    ({"tasks": 6}, "6 tasks and 8 files, 5 and 8 before"), ({"files": 10}, None),
    ({"files": 11}, "5 tasks and 11 files, 5 and 8 before"),
])  # fmt: skip
def test_growth_is_counted_from_the_minute_when_the_proxy_is_warm(last, said):
    before, warm = ({"minute": n, "memory": 9 * n, "files": 8, "tasks": 5} for n in (0, 1))
    assert grown([before, warm, {"minute": 2, "memory": 0, "files": 8, "tasks": 5} | last], 1) == said
