"""Draws what `benchmarks/serving.py` measured, where matplotlib is: `.venv/bin/python benchmarks/serving_plot.py`."""

import json
import re

from common import OUTPUT, ROOT, Bars, draw


def main():
    file = OUTPUT / "serving.json"
    if not file.is_file():
        raise SystemExit(f"{file} is missing: run benchmarks/serving.py first")
    record = json.loads(file.read_text(encoding="utf-8"))
    ratios = {f"{row[0]} at once": spread(row[4]) for row in record["rows"] if "," not in row[0]}
    ratios |= {f"{row[0].split(',')[0]}, a quarter of the KV": spread(row[4]) for row in record["scarce"]}
    draw(Bars("tokens a second, APAR / plain", ratios), "On vLLM's server", ROOT / "docs" / "serving.png")


def spread(cell):
    """Median, lowest and highest value of a cell such as `1.59 (1.55 to 1.60)`."""
    return [float(one) for one in re.findall(r"[\d.]+", cell)]


if __name__ == "__main__":
    main()
