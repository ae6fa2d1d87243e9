"""`DoctorCallback` in real trainers on a tiny model: TRL's own GRPOTrainer and ours."""

import json
import math
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig, GRPOTrainer

from bandpo.cli import main
from bandpo.doctor import examine_log
from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer, DoctorCallback
from trl_runs import reward, settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:The trust region of .* can never bind"),
    pytest.mark.filterwarnings("ignore:no group of this run ever had rewards that differ"),
]


def run(trainer, config, folder, make_model, tokenizer, prompts, callback, *, rewards=reward, **changes):
    return trainer(
        model=make_model(), reward_funcs=rewards, args=config(**settings(folder, **changes)), train_dataset=prompts,
        processing_class=tokenizer, callbacks=[callback],
    )  # fmt: skip


BOTH = [(GRPOTrainer, GRPOConfig), (BandGRPOTrainer, BandGRPOConfig)]
INERT = {"num_iterations": 1, "steps_per_generation": 1, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(("trainer", "config"), BOTH)
def test_a_run_whose_region_is_inert(trainer, config, tmp_path, make_model, tokenizer, prompts):
    said = []
    callback = DoctorCallback(patience=4, say=said.append)
    made = run(trainer, config, tmp_path, make_model, tokenizer, prompts, callback, max_steps=8, **INERT)
    made.train()
    assert [(t.finding.rule, t.step) for t in callback.told if t.finding.rule == "clipping"] == [("clipping", 4)]
    [text] = [text for text in said if "clipping" in text]
    assert text.startswith("step 4, doctor: clipping: clip_ratio/region_mean is 0 in all 4 rows")
    assert "each rollout is used for one optimiser step" in text
    rows = [row for row in made.state.log_history if "train_runtime" not in row]
    assert {(f.rule, f.level, f.seen) for f in callback.findings()} == {
        (f.rule, f.level, f.seen) for f in examine_log(rows) if f.rule not in ("columns", "log")
    }


@pytest.mark.parametrize(("trainer", "config"), BOTH)
def test_a_run_without_signal_is_stopped(trainer, config, tmp_path, make_model, tokenizer, prompts):
    said = []
    callback = DoctorCallback(patience=3, say=said.append, stop=True)
    made = run(
        trainer, config, tmp_path, make_model, tokenizer, prompts, callback,
        rewards=lambda completions, **_: [1.0] * len(completions), max_steps=30,
    )  # fmt: skip
    made.train()
    assert made.state.global_step == 3
    assert "no group ever had a signal" in said[0] and "Set: prompts of medium difficulty" in said[0]
    assert said[-1] == "step 3, doctor: the training ends here, as stop=True asks"


def test_a_run_that_collapses(tmp_path, make_model, tokenizer, prompts):
    """A reward for one token at a large rate: the policy becomes deterministic within few steps."""
    said = []

    def one_letter(prompts, completions, **_):
        return [float(len(c) - len(set(c))) / max(len(c), 1) for c in completions]

    callback = DoctorCallback(patience=10, say=said.append)
    made = run(
        GRPOTrainer, GRPOConfig, tmp_path, make_model, tokenizer, prompts, callback, rewards=one_letter, max_steps=60,
        learning_rate=0.1, num_generations=8,
    )  # fmt: skip
    made.train()
    entropies = [row["entropy"] for row in made.state.log_history if "entropy" in row]
    assert entropies[-1] < 0.2 * entropies[0]
    [told] = [t for t in callback.told if t.finding.rule == "entropy"]
    assert "collapse" in told.finding.seen and 10 <= told.step <= 60
    assert "bandpo-kl-upper" in told.finding.knob


def test_a_resumed_run_is_watched_from_its_beginning(tmp_path, make_model, tokenizer, prompts):
    def made(callback, steps):
        return run(
            BandGRPOTrainer, BandGRPOConfig, tmp_path, make_model, tokenizer, prompts, callback, max_steps=steps,
            save_strategy="steps", save_steps=4, **INERT,
        )  # fmt: skip

    first, second, said = DoctorCallback(patience=4, say=lambda _: None), DoctorCallback(patience=4), []
    made(first, 4).train()
    second._say = said.append
    made(second, 8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [t.step for t in first.told if t.finding.rule == "clipping"] == [4]
    assert [t.step for t in second.told if t.finding.rule == "clipping"] == [4]
    assert not [text for text in said if "clipping" in text]  # it was told before
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert "DoctorCallback" not in json.dumps(state["stateful_callbacks"])


def test_it_logs_a_warning_by_default_and_checks_its_options(caplog, tmp_path, make_model, tokenizer, prompts):
    callback = DoctorCallback(patience=3)
    run(GRPOTrainer, GRPOConfig, tmp_path, make_model, tokenizer, prompts, callback, max_steps=4, **INERT).train()
    assert any("doctor: clipping" in record.getMessage() for record in caplog.records)
    with pytest.raises(ValueError, match="stop: 'collapse' is no rule of a log"):
        DoctorCallback(stop=["collapse"])


def test_the_watch_changes_nothing_in_the_run(tmp_path, make_model, tokenizer, prompts):
    def log(name, callbacks):
        made = BandGRPOTrainer(
            model=make_model(), reward_funcs=reward, args=BandGRPOConfig(**settings(tmp_path / name)), train_dataset=prompts,
            processing_class=tokenizer, callbacks=callbacks,
        )  # fmt: skip
        made.train()
        timings = ("_runtime", "_per_second", "_time")
        return [{k: v for k, v in row.items() if not k.endswith(timings)} for row in made.state.log_history]

    assert log("with", [DoctorCallback()]) == log("without", None)


def test_all_processes_stop_where_the_first_one_does(monkeypatch):
    """Only the first process decides, because a process that stops alone would leave the others waiting."""
    sent = []

    def broadcast(flag, src):
        sent.append((int(flag), src))
        flag.fill_(1)

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.broadcast", broadcast)
    args = SimpleNamespace(world_size=2, device="cpu")
    state = TrainerState(global_step=3, is_world_process_zero=False)
    callback, control = DoctorCallback(stop=True), TrainerControl()
    callback.on_log(args, state, control, {"entropy": 1.0})
    assert sent == [(0, 0)] and control.should_training_stop
    silent, control = DoctorCallback(), TrainerControl()  # without `stop` nothing is sent
    silent.on_log(args, state, control, {"entropy": math.nan})
    assert len(sent) == 1 and not control.should_training_stop


def test_bandpo_train_tells_and_the_report_has_it(tmp_path, monkeypatch, capsys):
    from bandpo.toy.models import WarmUp, build_model, build_tokenizer

    tokenizer = build_tokenizer()
    build_model(WarmUp(hidden_size=16, layers=1), tokenizer).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(40))
    )
    (tmp_path / "flat_reward.py").write_text("def one(completions, **_):\n    return [1.0 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    status = main(
        ["train", "--model", "tiny", "--dataset", "data.jsonl", "--reward", "flat_reward:one", "--max_completion_length", "4",
         "--per_device_train_batch_size", "8", "--num_generations", "4", "--steps_per_generation", "2", "--max_steps", "24",
         "--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none", "--eval_prompts",
         "4", "--eval_samples", "2", "--logging_steps", "1", "--output_dir", "run"]
    )  # fmt: skip
    assert status == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if ", doctor: signal" in line]
    assert len(lines) == 1 and lines[0].startswith("step 20, doctor: signal: no group ever had a signal")
    assert "step 20, doctor: signal: no group ever had a signal" in (tmp_path / "run" / "report.html").read_text()
