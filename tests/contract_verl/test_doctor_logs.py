"""Files that verl's own writers write, read by the doctor; TensorBoard's and W&B's readers are the oracle."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="verl has an environment of its own; `make test` runs this file there (.venv-verl)")

from verl import DataProto
from verl.utils.tracking import Tracking

from bandpo.doctor import examine_batch, examine_log
from bandpo.doctor.batch import load_batch
from bandpo.doctor.logs import log_files, read_log
from bandpo.monitoring.symptoms import Log

STEPS = 30


def row(step):
    return {
        "actor/entropy": np.float64(1 / step), "actor/pg_clipfrac": 0.001 * step, "actor/grad_norm": np.float32(0.5 + step),
        "actor/ppo_kl": math.nan if step == 7 else 1e-7 * step, "critic/score/mean": 0.1, "training/global_step": step,
        "training/rollout_probs_diff_mean": torch.tensor(0.003).item(), "timing_s/step": 10**9 + step,
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verl")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_FILE_LOGGER_PATH", str(folder / "file.jsonl"))
        patch.setenv("TENSORBOARD_DIR", str(folder / "tensorboard" / "run"))
        tracking = Tracking("project", "experiment", ["console", "file", "tensorboard"])
        for step in range(1, STEPS + 1):
            tracking.log(row(step), step=step)
        tracking.finish()
    (folder / "console.log").write_text(out.getvalue())
    return folder


@pytest.mark.parametrize("name", ["file.jsonl", "console.log", "tensorboard/run", "."])
def test_verl_s_loggers(written, name):
    log = Log(read_log(written / name))
    assert log.rows == STEPS
    for what, column in (("entropy", "actor/entropy"), ("clip", "actor/pg_clipfrac"), ("gradient", "actor/grad_norm"),
                         ("mismatch", "training/rollout_probs_diff_mean"), ("reward", "critic/score/mean")):  # fmt: skip
        found, values = log.found[what]
        assert found == column
        assert list(values) == pytest.approx([float(row(step)[column]) for step in range(1, STEPS + 1)], rel=1e-6)
    [broken] = [f for f in examine_log(read_log(written / name)) if f.rule == "nonfinite"]
    assert broken.level == "problem" and "actor/ppo_kl is not finite in 1 rows" in broken.seen


def test_the_scalars_are_those_that_tensorboard_reads(written):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [file] = log_files(written / "tensorboard" / "run")
    oracle = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    ours = {}
    for found in read_log(file):
        for tag, value in found.items():
            ours.setdefault(tag, []).append((found["step"], value))
    del ours["step"]
    assert ours.keys() == set(oracle.Tags()["scalars"])
    for tag, values in ours.items():
        theirs = [(float(event.step), event.value) for event in oracle.Scalars(tag)]
        assert list(map(repr, values)) == list(map(repr, theirs))


def test_a_dataproto(tmp_path):
    old = -torch.rand(4, 8) - 0.1
    tensors = {"old_log_probs": old, "rollout_log_probs": old - 0.1, "advantages": torch.randn(4, 8),
               "response_mask": torch.ones(4, 8), "responses": torch.ones(4, 8, dtype=torch.long)}  # fmt: skip
    data = DataProto.from_dict(tensors=tensors)
    data.save_to_disk(tmp_path / "whole.pt")
    with pytest.raises(
        ValueError, match=r"a pickle runs code when it is read, also verl's DataProto.save_to_disk; save the"
    ):
        load_batch(tmp_path / "whole.pt")
    torch.save(data.batch, tmp_path / "tensordict.pt")
    with pytest.raises(ValueError, match=r"of a TensorDict, .* save torch.save\(data.batch.to_dict\(\), 'batch.pt'\)"):
        load_batch(tmp_path / "tensordict.pt")
    torch.save(data.batch.to_dict(), tmp_path / "batch.pt")
    found = {f.rule: f for f in examine_batch(load_batch(tmp_path / "batch.pt"))}
    assert found["mismatch"].level == "warning" and found["ratios"].seen.startswith("not known")
