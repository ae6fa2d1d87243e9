"""Whole runs of `bandpo train --method ...`."""

import json
import shutil

import pytest
import yaml

from command_line import warm_bandpo

SMALL = [
    "--rounds", "2", "--prompts_per_round", "24", "--samples_per_prompt", "8", "--warm_up_steps", "100", "--eval_prompts", "6",
    "--eval_samples", "4", "--per_device_train_batch_size", "16",
]  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("method", ["chipo", "online-dpo", "rdrc", "rbrm"])
def test_each_method_trains_and_leaves_the_same_things(method, tmp_path):
    extra = ["--probe_prompts", "20"] if method == "rbrm" else []
    result = warm_bandpo("train", "--method", method, *SMALL, *extra, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / f"{method}-countdown-seed0"
    found = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "figures", "report.html",
            "model", "rounds"} <= found  # fmt: skip
    assert yaml.safe_load((folder / "config.yaml").read_text())["method"] == method
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert {"reward", "pairs", "concentrability/log_mean", "rewards/margins", "generated_tokens"} <= set(rows[0])
    assert (rows[1]["generated_tokens"] == 0) == (method in ("chipo", "rbrm"))
    assert "<svg" in (folder / "report.html").read_text()


@pytest.mark.usefixtures("offline")
def test_config_repeats_a_run_and_an_interrupted_one_goes_on(tmp_path):
    whole = warm_bandpo("train", "--method", "pdfr", *SMALL, "--output_dir", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    again = warm_bandpo("train", "--config", "whole/config.yaml", "--output_dir", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    first = warm_bandpo("train", "--config", "whole/config.yaml", "--rounds", "1", "--output_dir", "part", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    resume = ["--output_dir", "part", "--resume_from_checkpoint", "latest"]
    rest = warm_bandpo("train", "--config", "whole/config.yaml", *resume, cwd=tmp_path)
    assert rest.returncode == 0, rest.stderr
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "again", "part")]
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "again", "part")]
    assert weights[0] == weights[1] == weights[2]
    assert metrics[0] == metrics[1] == metrics[2]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("extra", [[], ["--lora_rank", "4"]], ids=["full", "lora"])
def test_pairs_of_your_own(extra, tmp_path):
    rows = [
        {"prompt": f"{a},{b},1={a + b}:", "chosen": f"{a}+{b}", "rejected": f"{a}-{b}"}
        for a in range(1, 7)
        for b in range(1, 5)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = warm_bandpo(
        "train", "--method", "chipo", "--pairs", "pairs.jsonl", "--logging_steps", "1", *extra, *SMALL, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "pairs/log_ratio/chosen" in log[0]
    assert (folder / "report.html").exists()


@pytest.mark.usefixtures("offline")
def test_a_run_on_pairs_goes_on_from_its_checkpoint(tmp_path):
    rows = [{"prompt": f"{a},1,1={a}:", "chosen": f"{a}+1-1", "rejected": f"{a}-1-1"} for a in range(2, 34)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = ["train", "--method", "dpo", "--pairs", "pairs.jsonl", "--max_steps", "4", "--save_steps", "2", *SMALL]
    for name in ("whole", "part"):
        assert warm_bandpo(*common, "--output_dir", name, cwd=tmp_path).returncode == 0
    shutil.rmtree(tmp_path / "part/checkpoint-4")
    shutil.rmtree(tmp_path / "part/model")
    resumed = warm_bandpo(*common, "--output_dir", "part", "--resume_from_checkpoint", "latest", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "part")]
    assert weights[0] == weights[1]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ppo"], "method: got 'ppo'"),
        (["--method", "dpo", "--objective", "ipo"], "leave it out"),
        (["--method", "pdfr", "--pairs", "x.jsonl"], "samples its own"),
        (["--method", "dpo", "--pairs", "x.jsonl"], "no such file"),
        (["--method", "rdrc", "--radius", "0.1"], "unknown option 'radius'"),
        (["--method", "dpo", "--lora_rank", "4"], "lora_rank"),
        (["--method", "dpo", "--beta", "-1"], "beta must be a positive number"),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments, message, tmp_path):
    result = warm_bandpo("train", *arguments, *SMALL, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()
