"""The page for users of verl, read by the doctor: both sides of each row have one region, and nothing on the right is refused.

That the functions are equal is checked in verl's own code, by tests/contract_verl/test_verl.py.
"""

import re
from pathlib import Path

import pytest

from bandpo import OBJECTIVES
from bandpo.bounds import Band
from bandpo.doctor.command import read_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrate_verl.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| `(.+?)` \| `(.+?)` \|$", PAGE, re.MULTILINE)
LAUNCHES = [code for code in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "main_ppo" in code]
TAIL = "data.train_batch_size=512 actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.rollout.n=16"


def setup_of(text, tmp_path):
    path = tmp_path / "launch.sh"
    path.write_text(text)
    return read_config(path)


def launch(cell):
    code = re.match(r"`(.+?)`", cell)
    options = code[1].split() if code and "=" in code[1] else []
    keys = [f"actor_rollout_ref.actor.{x.replace('loss_mode', 'policy_loss.loss_mode')}" for x in options]
    return f"python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo {' '.join(keys)} {TAIL}\n"


@pytest.mark.parametrize(("theirs", "ours", "case"), ROWS, ids=[row[2] for row in ROWS])
def test_each_row_has_one_region(theirs, ours, case, tmp_path):
    before, after = setup_of(launch(theirs), tmp_path), setup_of(launch(f"`{ours}`"), tmp_path)
    assert before.host == after.host and not before.ours and after.ours
    assert not after.refused and not after.bypassed and not after.unread
    assert before.objective.bounds == after.objective.bounds == OBJECTIVES[case].bounds
    assert before.objective.ratio_level == after.objective.ratio_level


def test_losses_that_ignore_verl_s_aggregation_are_given_theirs():
    """verl's sapo and geo_mean average in each sequence first, whatever loss_agg_mode is; with bandpo it acts."""
    for theirs, ours, case in ROWS:
        fixed = "loss_mode=sapo" in theirs or "loss_mode=geo_mean" in theirs
        assert (f"loss_agg_mode={OBJECTIVES[case].aggregation}" in ours) == fixed


def test_each_row_is_compared_in_verl_s_code():
    text = (ROOT / "tests" / "contract_verl" / "test_verl.py").read_text()
    assert len(ROWS) == 6
    for theirs, _, case in ROWS:
        mode, widths = re.search(rf'"{case}": \("(\w+)", (.+?), (?:True|False)\)', text).groups()
        found = re.search(r"loss_mode=(\w+)", theirs)
        assert mode == (found[1] if found else "vanilla")
        for name, place in (("clip_ratio_low", 0), ("clip_ratio_high", 1)):
            if value := re.search(rf"{name}=(\S+?)[ `]", theirs):
                assert float(value[1]) == float(re.search(r"clip\((.+?)\)", widths)[1].split(", ")[place])


def test_the_launch_lines_are_the_same_loss_and_a_band(tmp_path):
    before, after, band = (setup_of(code, tmp_path) for code in LAUNCHES)
    assert before.objective.bounds == after.objective.bounds and before.steps == after.steps == band.steps
    for found in (after, band):
        assert found.ours and not found.refused and not found.bypassed
    assert isinstance(band.objective.bounds, Band) and band.objective.radius == 0.03


def test_options_of_verl_s_own_clip_are_refused(tmp_path):
    changed = LAUNCHES[1].replace("clip_ratio_c=10", "clip_ratio_c=10 actor_rollout_ref.actor.clip_ratio_high=0.28")
    assert "clip_ratio_high=0.28 would be ignored" in setup_of(changed, tmp_path).refused
