"""What a resume may change is what the run then does, and its folder says so."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from bandpo.cli import main
from bandpo.integrations.trl.checkpoint import _hyperparameters, _set_hyperparameters
from bandpo.train.folder import _refuse_changes, _with_resume

SMALL = [
    "--per_device_train_batch_size", "16", "--num_generations", "4", "--warm_up_steps", "5", "--eval_prompts", "4",
    "--save_total_limit", "5",
    "--eval_samples", "2", "--logging_steps", "1", "--save_steps", "2", "--output_dir", "run",
]  # fmt: skip
LATEST = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_more_steps_and_another_rate_are_made_and_recorded(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", *SMALL, "--max_steps", "4"]) == 0
    before = rows(folder)
    changed = ["--max_steps", "6", "--learning_rate", "1e-3", "--weight_decay", "0.5"]
    assert main(["train", *SMALL, *changed, *LATEST]) == 0
    told = "max_steps 4 -> 6, learning_rate 0.0002 -> 0.001, weight_decay 0.0 -> 0.5"
    assert f"this run began with other settings: {told}. It continues with the new ones" in capsys.readouterr().out
    assert rows(folder)[:4] == before[:4]
    assert [row["learning_rate"] for row in rows(folder)] == [2e-4] * 4 + [1e-3] * 2
    line = f"From step 4 on the run had other settings: {told}"
    config = (folder / "config.yaml").read_text()
    assert config.startswith(f"# {line}\n")
    assert yaml.safe_load(config)["max_steps"] == 6 and yaml.safe_load(config)["learning_rate"] == 1e-3
    assert yaml.safe_load((folder / "config.resolved.yaml").read_text())["max_steps"] == 6
    page = (folder / "report.html").read_text()
    assert line.replace(">", "&gt;") in page and (folder / "report-before-step-4.html").exists()
    for card in (folder / "README.md", folder / "model" / "README.md"):
        assert line in card.read_text() and "| optimiser steps | 6 |" in card.read_text()
    # It is finished with these settings, and a further call makes nothing.
    assert main(["train", *SMALL, *changed, *LATEST]) == 0
    assert "is finished" in capsys.readouterr().out
    # From an earlier checkpoint with the old settings: what was changed is taken back.
    assert main(["train", *SMALL, "--max_steps", "4", "--resume_from_checkpoint", "run/checkpoint-4"]) == 0
    assert not (folder / "resumes.jsonl").read_text()
    assert "#" not in (folder / "config.yaml").read_text()
    assert rows(folder) == before


def test_what_the_evaluation_before_depends_on_is_refused(tmp_path, capsys):
    assert main(["train", *SMALL, "--max_steps", "2"]) == 0
    capsys.readouterr()
    cases = (("--eval_samples", "4", "2 -> 4"), ("--seed", "1", "0 -> 1"), ("--temperature", ".5", "1.0 -> 0.5"))
    for option, value, told in cases:
        assert main(["train", *SMALL, "--max_steps", "4", option, value, *LATEST]) == 2
        assert f"began with other settings: {option[2:]} {told}. Its first evaluation" in capsys.readouterr().err
    # A default that is left out, or written out, is no change.
    assert main(["train", *SMALL, "--max_steps", "2", "--weight_decay", "0", *LATEST]) == 0
    assert "is finished" in capsys.readouterr().out


def test_rows_of_steps_that_are_made_again_become_part_of_the_new_one():
    first = _with_resume([], 8, {"max_steps": (4, 8)})
    assert first == [{"step": 8, "changed": {"max_steps": [4, 8]}}]
    second = _with_resume(first, 10, {"max_steps": (8, 9), "radius": (1, 2)})
    assert second == [*first, {"step": 10, "changed": {"max_steps": [8, 9], "radius": [1, 2]}}]
    assert _with_resume(second, 9, {}) == [*first, {"step": 9, "changed": {"max_steps": [8, 9], "radius": [1, 2]}}]
    assert _with_resume(second, 6, {"radius": (2, 1)}) == [{"step": 6, "changed": {"max_steps": [4, 9]}}]
    assert _with_resume(second, 6, {"radius": (2, 1), "max_steps": (9, 4)}) == []
    assert _with_resume(first, 8, {}) == first
    assert _with_resume(first, None, {"rounds": (1, 2)}) == [*first, {"step": None, "changed": {"rounds": [1, 2]}}]


def test_examples_before_a_question_cannot_change():
    with pytest.raises(ValueError, match="began with other settings: shots 1 -> 2"):
        _refuse_changes(Path("run"), {"shots": (1, 2), "max_steps": (4, 8)})


class Counting(torch.optim.SGD):
    """Keeps its state in its groups, as schedule-free optimisers do."""

    def __init__(self, params, lr=1.0, **options):
        super().__init__(params, lr, **options)
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["k"] += 1


def test_the_state_that_an_optimiser_keeps_in_its_groups_is_that_of_the_checkpoint():
    def made(**options):
        optimiser = Counting([torch.nn.Parameter(torch.ones(1))], **options)
        return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))

    first, schedule = made(lr=0.5)
    for _ in range(3):
        first.step()
        schedule.step()
    second, again = made(lr=0.25, weight_decay=0.1)
    asked = _hyperparameters(second)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(schedule.state_dict())
    _set_hyperparameters(second, again, asked)
    [group] = second.param_groups
    assert (group["k"], group["weight_decay"], group["lr"], group["initial_lr"]) == (3, 0.1, 0.25 / 4, 0.25)
