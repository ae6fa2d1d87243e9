"""Pruning and packing on the main job: the committed results, and that the command that made them works."""

import json
from pathlib import Path

import numpy as np
import pytest

from bandpo.cli import main
from bandpo.lab.experiments.selection import ARMS
from bandpo.lab.experiments.selection_figures import plot_selection

PUBLISHED = Path(__file__).parents[2] / "docs" / "selection.json"


@pytest.fixture(scope="module")
def arms():
    return json.loads(PUBLISHED.read_text())["arms"]


def mean(rows, key):
    return np.mean([row[key] for row in rows])


def test_published_runs_say_what_the_page_says(arms):
    assert set(arms) == set(ARMS) and all(len(rows) >= 3 for rows in arms.values())
    full = arms["full"]
    for name in ("pruned 0.5", "pruned 0.7", "pruned 0.5, packed", "both 0.5, packed"):
        assert mean(arms[name], "tokens") < 0.5 * mean(full, "tokens"), name  # half the update tokens
    for name, rows in arms.items():
        assert mean(rows, "after") > mean(rows, "before") + 0.1, name  # all of them learn
    assert mean(arms["packed"], "tokens") == pytest.approx(mean(full, "tokens"), rel=0.05)


def test_the_figure_is_drawn_from_them(arms):
    assert len(plot_selection({"arms": arms}).axes) == 3


@pytest.mark.slow
def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = [
        "lab",
        "selection",
        "--output",
        str(tmp_path),
        "--only",
        "both 0.5, packed",
        "--seeds",
        "1",
        "--steps",
        "8",
    ]
    assert main(options) == 0
    found = json.loads((tmp_path / "selection.json").read_text())
    (row,) = found["arms"]["both 0.5, packed"]
    assert row["tokens"] > 0 and row["update_seconds"] > 0 and 0 < row["density"] <= 1
    assert (tmp_path / "selection.png").exists()
    assert main(["lab", "selection", "--only", "nope"]) == 2
    assert "choose from full" in capsys.readouterr().err
