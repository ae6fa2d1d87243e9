"""The complete scripts in examples/: they run, leave what they say, and a run that is resumed is the run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason="the script trains an adapter")

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning", "ignore:.*pin_memory"),
]


@pytest.fixture
def example(monkeypatch):
    """A function that imports an example as Python imports a module of that name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # an import path "name:OBJECTIVE" finds it
        spec.loader.exec_module(module)
        return module

    return load


def adapter(folder):
    return load_file(folder / "model" / "adapter_model.safetensors")


def rows(trainer, key):
    return [(row["step"], row[key]) for row in trainer.state.log_history if key in row]


def test_the_trl_script_trains_saves_and_resumes(example, tmp_path, capsys):
    main = example("trl_script").main
    common = ["--save_steps", "2"]
    whole = main(["--output", str(tmp_path / "whole"), "--steps", "4", *common])
    said = capsys.readouterr().out
    assert "step    0: reward on held-out questions" in said and "step    4: reward on held-out questions" in said
    assert (tmp_path / "whole" / "checkpoint-4").is_dir()
    card = json.loads((tmp_path / "whole" / "model" / "adapter_config.json").read_text())
    assert card["r"] == 16
    assert "<assistant>" in (tmp_path / "whole" / "model" / "chat_template.jinja").read_text()
    # both rewards are logged, and the sum has their weights
    (step, total), *_ = rows(whole, "reward")
    parts = [dict(rows(whole, f"rewards/{name}/mean"))[step] for name in ("correct", "form")]
    assert total == pytest.approx(parts[0] + 0.5 * parts[1], abs=1e-5)
    assert all(value is not None for row in whole.state.log_history for value in row.values())

    main(["--output", str(tmp_path / "parts"), "--steps", "2", *common])
    before = adapter(tmp_path / "parts")
    resumed = main(["--output", str(tmp_path / "parts"), "--steps", "4", "--resume", *common])
    assert rows(resumed, "loss") == rows(whole, "loss") and len(rows(whole, "loss")) == 2
    assert rows(resumed, "eval_reward") == rows(whole, "eval_reward")
    want, got = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert any(not torch.equal(before[name], got[name]) for name in got)


def test_the_trl_script_refuses_to_resume_what_is_not_there(example, tmp_path):
    with pytest.raises(ValueError, match="has no whole checkpoint"):
        example("trl_script").main(["--output", str(tmp_path / "none"), "--resume"])


def test_the_objective_of_the_example_is_found_by_its_import_path(example, tmp_path):
    from bandpo import policy_loss
    from bandpo.integrations.trl import BandGRPOConfig
    from bandpo.zoo import get_objective

    mine = example("own_objective").MINE
    assert get_objective("own_objective:MINE") is mine
    args = BandGRPOConfig(str(tmp_path), objective="own_objective:MINE", use_cpu=True, bf16=False)
    assert (args.loss_type, args.scale_rewards) == ("dapo", "group")
    # the known answer: inside r·A, and above the edge a tenth of the slope for A > 0, but all of it for A < 0
    old = torch.full((2, 2), 0.2, dtype=torch.float64).log()
    new = (old + torch.tensor([0.1, 1.2])).requires_grad_()
    loss, _ = policy_loss(
        logprobs=new, old_logprobs=old, advantages=torch.tensor([1.0, -1.0], dtype=torch.float64),
        mask=torch.ones(2, 2), objective=mine,
    )  # fmt: skip
    loss.backward()
    ratio = torch.tensor([0.1, 1.2], dtype=torch.float64).exp()
    want = ratio * torch.tensor([[1.0, 0.1], [-1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(-4 * new.grad, want, rtol=1e-6, atol=1e-9)
