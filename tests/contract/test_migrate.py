"""The page for users of TRL: its code runs, and each row of its table is TRL's loss to the last bit or up to rounding."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.toy.models import WarmUp, build_model, build_tokenizer
from trl_runs import loss_and_gradient, reward, rollout, saved, settings

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*pin_memory", "ignore:The trust region of"
)

PAGE = (Path(__file__).parents[2] / "docs" / "migrate_trl.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| `(.+?)` \| (the same .+?) \|$", PAGE, re.MULTILINE)


def options(text):
    """The options in a cell: the text of its code, which is that of keyword arguments."""
    code = re.match(r"`(.+?)`", text)
    return eval(f"dict({code[1]})") if code else {}


def test_the_table_is_read():
    assert len(ROWS) == PAGE.count("| the same") >= 12
    assert options(ROWS[0][0]) == {} and options(ROWS[1][0]) == {"loss_type": "grpo"}


@pytest.mark.parametrize(("theirs", "ours", "how"), ROWS, ids=[row[1] for row in ROWS])
def test_each_row_is_trl_s_loss(theirs, ours, how, make_model, tokenizer, prompts, tmp_path):
    make = saved(make_model, tmp_path)
    common = {"reward_funcs": reward, "train_dataset": prompts, "processing_class": tokenizer}
    host = GRPOTrainer(model=make(), args=GRPOConfig(**settings(tmp_path, **options(theirs))), **common)
    mine = BandGRPOTrainer(model=make(), args=BandGRPOConfig(**settings(tmp_path, **options(f"`{ours}`"))), **common)
    assert mine.scale_rewards == host.scale_rewards and mine.beta == host.beta
    inputs = rollout(tokenizer)
    want, got = loss_and_gradient(host, inputs), loss_and_gradient(mine, inputs)
    assert want[1].abs().max() > 1e-4
    if how == "the same bits":
        assert got[0] == want[0] and torch.equal(got[1], want[1])
    else:
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-6 * want[1].abs().max().item())


TINY = (
    "output_dir='out', use_cpu=True, bf16=False, gradient_checkpointing=False, report_to='none', save_strategy='no', "
    "per_device_train_batch_size=8, max_completion_length=4, learning_rate=1e-2, disable_tqdm=True, "
)


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=["before", "after", "same", "own"]
)
def test_the_code_runs(code, tmp_path, monkeypatch):
    """With a tiny model in place of the Hub's. The third block compares two whole runs, to the last bit."""
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    build_model(WarmUp(hidden_size=16, layers=1), tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    code = code.replace('"Qwen/Qwen2.5-0.5B-Instruct"', '"model"')
    tiny = TINY if "max_steps" in code else TINY + "max_steps=1, "
    code = re.sub(r"((?:Band)?GRPOConfig\()(?=\w+=)", rf"\1{tiny}", code)
    assert "use_cpu=True" in code
    scope = {
        "reward": lambda completions, **_: [float(sum(map(ord, c)) % 3 == 0) for c in completions],
        "dataset": Dataset.from_list([{"prompt": f"{a}+1="} for a in range(16)]),
    }
    exec(code, scope)
    if "before" in scope:
        assert len(scope["before"]) == 4 and len(set(scope["before"])) > 1
