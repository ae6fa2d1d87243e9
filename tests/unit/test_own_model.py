"""An own model on a CPU, without a word about devices: what is chosen, said, scored again, and written into its card."""

import json
import os

import datasets
import pytest
import yaml

from bandpo.cli import main
from bandpo.train import compute

REWARD = "def short(prompts, completions, answer, **_):\n    return [float(len(c) % 2) for c in completions]\n"
CONFIG = (
    "model: model\ndataset: data.jsonl\nreward: my_rewards:short\nmax_completion_length: 6\nnum_iterations: 2\n"
    "per_device_train_batch_size: 8\nnum_generations: 4\nsteps_per_generation: 2\nmax_steps: 2\nlogging_steps: 1\n"
    "gradient_checkpointing: false\nreport_to: none\neval_prompts: 6\neval_samples: 4\nlearning_rate: 1e-3\n"
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    from bandpo.toy.models import WarmUp, build_model, build_tokenizer

    tokenizer = build_tokenizer()
    build_model(WarmUp(hidden_size=32, layers=2), tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"what is {i}+1?" * (1 + i % 3), "answer": str(i + 1)} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "cpuinfo").write_text("flags : avx512_bf16\n")
    monkeypatch.setattr(compute, "_CPU_FILE", tmp_path / "cpuinfo")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    datasets.enable_progress_bars()
    yield
    datasets.disable_progress_bars()


def scores(path):
    found = json.loads(path.read_text())
    return {name: found[name] for name in ("mean@4", "pass@1", "pass@4")}


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_small_one_trains_in_float32_and_its_adapter_has_the_card_of_the_run(tmp_path, capfd):
    assert main(["train", "--config", "run.yaml", "--output_dir", "out", "--lora_rank", "2"]) == 0
    out, err = capfd.readouterr()
    assert (
        "computing on the CPU (there is no GPU) in float32 (the CPU has AVX-512 BF16, which is slower below 4M" in out
    )
    for text in (out, err):  # the bars of transformers and datasets
        assert "examples/s" not in text and "%|" not in text
    resolved = yaml.safe_load((tmp_path / "out" / "config.resolved.yaml").read_text())
    assert (resolved["use_cpu"], resolved["bf16"], resolved["fp16"]) == (True, False, False)
    assert "bf16" not in (tmp_path / "out" / "config.yaml").read_text()  # another machine chooses for itself
    assert log(tmp_path / "out")[0]["sampling/sampling_logp_difference/max"] < 1e-5
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["library_name"] == "peft" and "lora" in head["tags"]
    for line in (
        "# out: bandpo-kl on data.jsonl", "| model | model |", "| adapter | LoRA of rank 2, alpha 32 |",
        "| data | data.jsonl |", "| columns | prompt (prompt), answer (answer) |", "| trained on | 34 prompts |",
        "| reward | my_rewards:short |", "| radius | 0.05 |", "| seed | 42 |", "| optimiser steps | 2 |",
        "| computed in | float32 |", "| 6 held-out prompts | before | after |", "Source: BandPO, [arXiv:2603.04918](",
        "an adapter (LoRA) for `model`. Licence of the base model: not stated", "- PEFT ", "@article{li2026bandpo,",
        "AutoModelForCausalLM.from_pretrained('model')", "PeftModel.from_pretrained(base, 'out/model')",
        "95% interval [", "`bandpo train --config out/config.yaml`",
    ):  # fmt: skip
        assert line in body, line
    assert head["base_model"] == "model" and "bandpo-kl" in head["tags"]
    assert "[More Information Needed]" not in card and "None" not in body.replace("not stated", "")
    assert "## Results" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_whose_model_is_elsewhere_is_refused_with_the_fix(tmp_path):
    from bandpo.train.evaluate_command import _check_base

    _check_base(tmp_path, "wheel:smollm2")  # a whole model
    base = tmp_path / "base"
    for text, refused in (
        (json.dumps({"base_model_name_or_path": str(base)}), True),
        (json.dumps({"base_model_name_or_path": "org/model"}), False),
        (json.dumps({"base_model_name_or_path": None}), False),
        ("[]", False),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        if refused:
            with pytest.raises(ValueError, match=r"for the model in .*base, made from wheel:smollm2, and there"):
                _check_base(tmp_path, "wheel:smollm2")
            base.mkdir()
        _check_base(tmp_path, None)


def test_a_larger_one_in_bfloat16_and_the_scores_of_the_run_are_repeated(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(compute, "SMALLEST_IN_BF16", 1000)
    assert main(["train", "--config", "run.yaml", "--output_dir", "out"]) == 0
    said = capfd.readouterr().out
    assert (
        "in bfloat16, with weights in float32 (the CPU has AVX-512 BF16, which is faster from 0.001M parameters on"
        in said
    )
    assert log(tmp_path / "out")[0]["sampling/sampling_logp_difference/mean"] > 1e-5
    assert "| computed in | bfloat16, weights in float32 |" in (tmp_path / "out" / "model" / "README.md").read_text()
    after = json.loads((tmp_path / "out" / "evaluation.json").read_text())["after"]
    assert main(["evaluate", "out", "--reward", "my_rewards:short", "--output", "e.json"]) == 0
    assert "in bfloat16, with weights in float32 (as the run). Override: --use-cpu, --bf16" in capfd.readouterr().out
    assert scores(tmp_path / "e.json") == {name: after[name] for name in ("mean@4", "pass@1", "pass@4")}
    (tmp_path / "cpuinfo").write_text("flags : sse\n")  # a machine without it
    assert main(["evaluate", "out", "--reward", "my_rewards:short"]) == 0
    assert "in float32 (no instructions for bfloat16 were found that torch uses)" in capfd.readouterr().out
    assert main(["evaluate", "out", "--reward", "my_rewards:short", "--use-cpu", "false"]) == 2
    assert "use_cpu=False: there is no accelerator" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "out", "--bf16", "perhaps"])
    # On such a machine the run continues in another precision, and says so.
    more = ["--max_steps", "4", "--resume_from_checkpoint", "latest"]
    assert main(["train", "--config", "run.yaml", "--output_dir", "out", *more]) == 0
    assert "began with other settings: max_steps 2 -> 4, bf16 True -> False" in capfd.readouterr().out
    assert (
        "From step 2 on the run had other settings: max_steps 2 -> 4, bf16 True -> False"
        in (tmp_path / "out" / "model" / "README.md").read_text()
    )


def test_the_evaluation_loads_float32_for_float32(tmp_path):
    import torch

    from bandpo.train.evaluate_command import _load_model

    folder, dtypes = str(tmp_path / "model"), {}
    for bf16 in (False, True):
        chosen = compute.Compute(use_cpu=True, bf16=bf16, fp16=False, line=None)
        dtypes[bf16] = _load_model(folder, chosen, local=True, trust_remote_code=False).dtype
    assert dtypes == {False: torch.float32, True: torch.float32}  # it was saved so
    _load_model(folder, chosen, local=True, trust_remote_code=False).to(torch.bfloat16).save_pretrained(folder)
    for bf16 in (False, True):
        chosen = compute.Compute(use_cpu=True, bf16=bf16, fp16=False, line=None)
        dtypes[bf16] = _load_model(folder, chosen, local=True, trust_remote_code=False).dtype
    assert dtypes == {False: torch.float32, True: torch.bfloat16}
    assert os.environ["HF_HUB_OFFLINE"] == "1"
