"""docs/figures.py: what it draws is in the masks, and what the documentation shows is what it draws."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "docs" / "figures.py"


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_cell_of_the_masks_is_drawn_and_no_other(figures):
    # By hand from the paper's figure 2: 4 queries, 4 words and a padding that may read and is never read.
    expected = {"ITC": 4 * 4 + 5 * 4, "ITG": 4 * 4 + 5 * 4 + (1 + 2 + 3 + 4 + 4), "ITM": 9 * 8}
    drawn = {axes.get_title().partition(":")[0]: len(axes.patches) for axes in figures.draw_masks().axes}
    assert drawn == expected


@pytest.mark.parametrize("name", ["masks.svg", "architecture.svg"])
def test_the_figures_shown_are_those_of_the_code(name, figures, tmp_path):
    shown = (FILE.parent / "images" / name).read_text()
    figures.main(tmp_path)
    drawn = (tmp_path / name).read_text()
    made_by = re.search(r"Matplotlib v[\d.]+", shown)[0]
    if made_by not in drawn:
        pytest.skip(f"{name} was drawn by {made_by}, whose letters are placed otherwise")
    assert shown == drawn, "make docs draws them again"
