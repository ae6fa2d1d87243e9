"""What a run of TRL leaves behind, read by the doctor: checkpoints, console, and the rollouts that the loss is given."""

import contextlib
import io
import json

import pytest
import torch
from trl import GRPOTrainer

from bandpo.doctor import examine_batch
from bandpo.doctor.batch import load_batch
from bandpo.doctor.batch_files import names_in
from bandpo.doctor.logs import log_files, read_log
from bandpo.monitoring.symptoms import Log
from trl_runs import trl_trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path_factory, make_model, tokenizer, prompts):
    """A run of four steps that is resumed from its second one: the folder, what it printed, its log, and its rollouts."""
    folder = tmp_path_factory.mktemp("trl")
    out, rollouts = io.StringIO(), []
    compute = GRPOTrainer._compute_loss

    def watched(self, model, inputs):
        rollouts.append({name: x.detach().clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)})
        return compute(self, model, inputs)

    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_compute_loss", watched)
        keep = {"save_strategy": "steps", "save_steps": 2}
        trl_trainer(folder, make_model, tokenizer, prompts, **keep).train()
        (folder / "checkpoint-4" / "trainer_state.json").unlink()  # killed before it was written
        resumed = trl_trainer(folder, make_model, tokenizer, prompts, max_steps=5, **keep)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return folder, out.getvalue(), resumed.state.log_history, rollouts


def check_checkpoint(folder, history):
    """The state in the newest checkpoint is the log."""
    [state] = log_files(folder)
    assert state.parent.name == "checkpoint-5"
    log = Log(read_log(folder))
    rows = [row for row in history if row["step"] <= 5 and "entropy" in row]
    assert len(rows) == 5
    for what, name in (("entropy", "entropy"), ("gradient", "grad_norm"), ("clip", "clip_ratio/region_mean"),
                       ("zero variance", "frac_reward_zero_std"), ("cut off", "completions/clipped_ratio")):  # fmt: skip
        assert log.found[what][0] == name
        assert list(log.found[what][1]) == [row[name] for row in rows if name in row]


def check_console(printed, history, tmp_path):
    """What a run prints is its log, up to the digits that are printed."""
    (tmp_path / "run.log").write_text(printed)
    log = Log(read_log(tmp_path / "run.log"))
    # four steps of the first process, then the third to the fifth of the second: a console has no steps
    assert len(log.found["entropy"][1]) == 7
    last = [row["entropy"] for row in history if "entropy" in row][-3:]
    assert list(log.found["entropy"][1])[-3:] == pytest.approx(last, rel=1e-3)


def check_rollout(rollouts, tmp_path):
    """A saved rollout is a batch."""
    saved = next(r for r in rollouts if "old_per_token_logps" in r)
    torch.save(saved, tmp_path / "rollout.pt")
    found = {f.rule: f for f in examine_batch(load_batch(tmp_path / "rollout.pt"))}
    assert found["ratios"].seen.startswith("not known")
    assert {"prompt_ids", "completion_ids", "num_items_in_batch"} <= set(names_in(tmp_path / "rollout.pt"))
    moved = {**saved, "per_token_logps": saved["old_per_token_logps"] - 0.1 * saved["completion_mask"]}
    torch.save(moved, tmp_path / "moved.pt")
    assert {f.rule: f for f in examine_batch(load_batch(tmp_path / "moved.pt"))}["ratios"].level == "ok"


def test_what_a_run_leaves_behind(run, tmp_path):
    folder, printed, history, rollouts = run
    check_checkpoint(folder, history)
    check_console(printed, history, tmp_path)
    check_rollout(rollouts, tmp_path)


def test_a_state_that_transformers_writes_is_read_as_json(tmp_path):
    from transformers.trainer_callback import TrainerState

    history = [{"step": s, "entropy": 1.0 / s, "loss": float("nan") if s == 2 else 0.0} for s in range(1, 4)]
    TrainerState(log_history=history).save_to_json(str(tmp_path / "trainer_state.json"))
    assert json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]["step"] == 1
    log = Log(read_log(tmp_path))
    assert list(log.found["entropy"][1]) == [1.0, 0.5, 1.0 / 3] and log.found["loss"][1][1] != log.found["loss"][1][1]
