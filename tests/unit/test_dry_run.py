"""`bandpo train --dry_run`: what the start of a run would find is found, all of it, and nothing is trained, fetched or made."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub.constants
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from bandpo.cli import main
from bandpo.monitoring.findings import Finding
from bandpo.train import memory, validate
from bandpo.train.compute import Machine
from bandpo.train.config import MistakesError, RunConfig, parse
from bandpo.train.steps import plan_lines, plan_mistakes

REWARDS = (
    "def short(prompts, completions, answer, **_):\n    return [float(len(c) % 2) for c in completions]\n\n\n"
    "def bug(prompts, completions, **_):\n    raise RuntimeError('my bug')\n\n\n"
    "def talks(prompts, completions, **_):\n    print('a: [')\n    return [1.0] * len(completions)\n\n\n"
    "def nothing(prompts, completions, **_):\n    return [None] * len(completions)\n"
)
CONFIG = (
    "model: model\ndataset: data.jsonl\nreward: dry_rewards:short\nmax_completion_length: 6\nnum_iterations: 2\n"
    "per_device_train_batch_size: 8\nnum_generations: 4\nsteps_per_generation: 2\nlogging_steps: 1\nuse_cpu: true\n"
    "bf16: false\ngradient_checkpointing: false\nreport_to: none\neval_prompts: 6\neval_samples: 4\n"
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    from bandpo.toy.models import WarmUp, build_model, build_tokenizer

    tokenizer = build_tokenizer()
    build_model(WarmUp(hidden_size=32, layers=2), tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"what is {i}+1?" * (1 + i % 3), "answer": str(i + 1)} for i in range(40)]
    write(tmp_path / "data.jsonl", rows)
    (tmp_path / "dry_rewards.py").write_text(REWARDS)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def dry(capsys, *more, status=0):
    found = main(["train", "--config", "run.yaml", "--dry_run", *more])
    out, err = capsys.readouterr()
    assert found == status, out + err
    return out, err


def test_a_run_that_is_fine(tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    out, err = dry(capsys)
    assert not err
    for line in (
        "-- dry run: nothing was trained or fetched", "ok configuration: bandpo-kl on data.jsonl, seed 42",
        "ok model: model, LlamaForCausalLM, 0.0269M parameters; all of them are trained; window: 128 tokens",
        "ok tokenizer: 98 tokens for 98 rows of the embedding, chat template: none",
        "ok data: data.jsonl: 34 prompts to train on, 6 held out",
        "ok reward dry_rewards:short: of the 32 first rows' own answers",
        "ok prompts of 34 rows in tokens: least 12, median 26, 95% up to 39, most 39; completions up to 6; window 128",
        "   | what is 0+1?", "-- a rollout with this number of processes: 4 prompts x 4 completions",
        "ok memory: about ", "ok doctor: fine: bypass, inert, anchor", "nothing wrong was found",
    ):  # fmt: skip
        assert f"# {line}" in out, line
    assert yaml.safe_load(out) == yaml.safe_load(CONFIG)  # without dry_run: the output is a file that trains
    text = out[: out.index("model: model\n")]
    assert all(line.startswith("# ") for line in text.splitlines())
    after = sorted(tmp_path.iterdir())
    assert [p for p in after if p not in before and p.name not in ("datasets", "__pycache__")] == []


def test_the_steps_are_those_that_the_run_makes(tmp_path, capsys):
    more = ["--num_train_epochs", "1", "--learning_rate", "1e-3"]
    out, _ = dry(capsys, *more)
    assert (
        "the run: 32 optimiser steps, 8 rollouts, 32 prompts sampled (0.941 times the 34 of the data), at most 768"
        in out
    )
    assert main(["train", "--config", "run.yaml", "--output_dir", "out", *more]) == 0
    assert "| optimiser steps | 32 |" in (tmp_path / "out" / "README.md").read_text()
    _, err = dry(capsys, "--output_dir", "out", status=2)
    assert "output_dir out holds a run already" in err
    _, err = dry(capsys, "--output_dir", "out", "--resume_from_checkpoint", "latest", "--seed", "1", *more, status=2)
    assert "began with other settings: seed 42 -> 1" in err
    _, err = dry(capsys, "--resume_from_checkpoint", "nowhere", status=2)
    assert "resume_from_checkpoint: nowhere is no folder" in err


def test_all_mistakes_of_a_configuration_are_named(capsys):
    _, err = dry(capsys, "--lora_rank", "-1", "--eval_samples", "0", "--radius", "-3", "--bad_rows", "maybe", status=2)
    for words in (
        "lora_rank must be >= 0, got -1",
        "eval_samples must be at least 1",
        "radius: must be",
        "bad_rows: got",
    ):
        assert words in err
    assert "4 mistakes" in err
    _, err = dry(capsys, "--modl", "x", "--rewardz", "y", status=2)
    assert "'modl'; did you mean 'model'?" in err and "'rewardz'; did you mean 'reward'?" in err
    # A run names them as well.
    assert main(["train", "--config", "run.yaml", "--lora_rank", "-1", "--eval_samples", "0"]) == 2
    assert "2 mistakes" in capsys.readouterr().err
    with pytest.raises(MistakesError, match="nothing to train on") as error:
        RunConfig(method="maybe", reward=[1])  # type: ignore[list-item]
    assert [m.partition(":")[0] for m in error.value.mistakes] == ["method", "reward", "nothing to train on"]


def test_mistakes_of_different_parts_are_named_together(tmp_path, capsys):
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(30)]
    rows += [
        {"question": "", "answer": "1"},
        {"question": "a?", "answer": None},
        {"question": "b" * 200, "answer": "2"},
    ]
    rows += [{"question": "c?", "answer": "3 hours 20 minutes and more"}]
    write(tmp_path / "bad.jsonl", rows)
    more = ["--dataset", "bad.jsonl", "--prompt_column", "question", "--reward", "math", "nowhere:f"]
    (tmp_path / "file").touch()
    out, err = dry(capsys, *more, "--output_dir", "file/a", status=2)
    for words in (
        "1 rows have no 'question', the first is row 31; mend them, or set bad_rows: skip", "1 rows have no 'answer'",
        "1 rows have an answer that math-verify cannot read", "1 rows are longer than 122 tokens", "nowhere:f",
        "output_dir file/a: ", "6 mistakes",
    ):  # fmt: skip
        assert words in err, words
    assert "!! prompts: 1 rows are longer" in out and "task:" not in out
    assert "\nmodel: model" not in out  # no configuration that does not start
    more = [*more[:-1], "--bad_rows", "skip"]
    out, _ = dry(capsys, *more)
    assert out.count("they are left out") == 4 and "24 prompts to train on, 6 held out" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--dataset", "none.jsonl"], "dataset 'none.jsonl': no such file"),
        (["--answer_column", "result"], "has no column 'result'; set answer_column to one of prompt, answer"),
        (["--model", "./modl"], "there is no such folder"),
        (["--model", "a b"], "it is no name of the Hub, which is ORGANISATION/NAME"),
        (["--dataset", "a/b/c"], "dataset 'a/b/c': there is no such folder or file"),
        (["--eval_prompts", "40"], "holding out 40 leaves none to train on"),
        (["--num_generations", "2", "--steps_per_generation", "20"], "the data has 34 prompts and a rollout takes 80"),
        (["--max_completion_length", "200"], "leaves no room for a prompt"),
        (["--report_to", "nowhere"], "report_to: got 'nowhere'"),
        (["--reward", "dry_rewards:none"], "dry_rewards:none"),
        (["--reward", "dry_rewards:bug"], "RuntimeError('my bug')"),
        (["--objective", "sapo", "--delta", "3"], "delta"),
        (["--model", "wheel:none"], "choose one of wheel:smollm2"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_a_mistake_is_found_before_a_run_would_find_it(more, said, capsys):
    _, err = dry(capsys, *more, status=2)
    assert said in err


def test_weights_and_tokens_that_the_model_lacks(tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained("model")
    (tmp_path / "model" / "generation_config.json").unlink()
    assert "nor the model has an end token" not in dry(capsys)[0]  # the configuration of the model has one
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    out, _ = dry(capsys)
    assert (
        "?? the tokenizer has tokens up to number 98, the model has 98: a text with a token beyond them ends the run"
        in out
    )
    assert "?? neither the tokenizer nor the model has an end token" in out
    assert "-- the tokenizer has no token for padding, and the one for the end is used" in out
    write(tmp_path / "data.jsonl", [{"prompt": f"<extra>{i}", "answer": "1"} for i in range(40)])
    (tmp_path / "model" / "model.safetensors").unlink()
    _, err = dry(capsys, status=2)
    assert "prompts have token number 98, and the model has 98" in err and "model has no weights (*.safetensors)" in err


def test_prompts_are_shown_as_the_model_gets_them(tmp_path, capsys):
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    out, _ = dry(capsys, "--system_prompt", "Be brief.")
    assert "#    | <system>Be brief.<user>what is " in out and "?<assistant>\n" in out
    assert "chat template: yes" in out


def test_answers_beyond_the_longest_completion(tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "answer": "12345678" if i % 2 else "1"} for i in range(40)]
    write(tmp_path / "data.jsonl", rows)
    out, _ = dry(capsys)
    assert "?? column answer in tokens: median " in out and "are longer than max_completion_length=6" in out


def test_what_is_on_the_hub_is_named_and_not_fetched(capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_a, **_k: pytest.fail("something was fetched"))
    out, _ = dry(capsys, "--model", "org/none", "--dataset", "org/none")
    assert "# -- not checked: model org/none, which is not on this machine and would be fetched from the Hub" in out
    assert "# -- not checked: dataset org/none, which is not on this machine and would be fetched" in out
    assert "ok reward dry_rewards:short: found; not called" in out
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_problems_of_a_run_that_would_start_have_status_1(capsys):
    out, _ = dry(capsys, "--num_iterations", "1", "--steps_per_generation", "1", status=1)
    assert "# !! doctor: inert: one optimiser step for each rollout" in out and "#    set: num_iterations=2" in out
    assert "# 1 problem: see !!" in out and yaml.safe_load(out)["num_iterations"] == 1
    out, _ = dry(capsys, "--reward", "dry_rewards:nothing", status=1)
    assert "!! reward dry_rewards:nothing: of the 32 first rows' own answers none has a score, 32 unscored" in out


def test_what_a_reward_prints_is_no_part_of_the_configuration(capsys):
    out, err = dry(capsys, "--reward", "dry_rewards:talks")
    assert "a: [" in err and "a: [" not in out
    assert yaml.safe_load(out) == yaml.safe_load(CONFIG) | {"reward": ["dry_rewards:talks"]}


def test_the_doctor_is_given_the_configuration_of_the_run(capsys, monkeypatch):
    asked = []

    def examine(args, *, vocabulary):
        asked.append((args.objective, args.radius, vocabulary))
        return [
            Finding("a", "warning", "seen"),
            Finding("b", "problem", "worse", "cause", "knob"),
            Finding("c", "ok", "x"),
        ]

    from bandpo.train import validate
    from bandpo.train.start import train

    monkeypatch.setattr(validate, "examine", examine)
    assert train(["--config", "run.yaml", "--dry_run", "--radius", "0.1"]) == 1
    out = capsys.readouterr().out
    assert asked == [("bandpo-kl", 0.1, 98)]
    assert "# ok doctor: fine: c\n# !! doctor: b: worse\n#    why: cause\n#    set: knob\n# ?? doctor: a: seen\n" in out


def test_own_objectives_are_tried(capsys):
    Path("dry_objectives.py").write_text(
        "import dataclasses\nfrom bandpo import OBJECTIVES\n"
        "WELL = dataclasses.replace(OBJECTIVES['grpo'], name='well')\n"
        "def lost(log_ratio, advantages, bounds):\n    return (0 * log_ratio).log() * advantages\n"
        "def broken(log_ratio, advantages, bounds):\n    return log_ratio @ advantages\n"
        "LOST = dataclasses.replace(WELL, surrogate=lost)\nBROKEN = dataclasses.replace(WELL, surrogate=broken)\n"
    )
    out, _ = dry(capsys, "--objective", "dry_objectives:WELL")
    assert "# ok objective dry_objectives:WELL: its surrogate pass the checks" in out
    out, _ = dry(capsys, "--objective", "dry_objectives:LOST", status=1)
    assert "# !! objective dry_objectives:LOST: its surrogate: on policy the gradient must be A" in out
    out, _ = dry(capsys, "--objective", "dry_objectives:BROKEN", status=1)
    assert re.search(
        r"# !! objective dry_objectives:BROKEN: its surrogate cannot be tried: .* at .*dry_objectives.py:7", out
    )


def test_methods_of_preferences(tmp_path, capsys):
    ours = "".join(
        line + "\n" for line in CONFIG.splitlines()
        if line.split(":")[0] not in ("num_iterations", "num_generations", "steps_per_generation")
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(
        f"{ours}method: online-dpo\nrounds: 3\nprompts_per_round: 17\nsamples_per_prompt: 4\n"
    )
    out, _ = dry(capsys, "--max_steps", "2")
    assert "ok configuration: online-dpo on data.jsonl" in out
    assert (
        "the run: 3 rounds, each of 17 prompts x 4 completions of up to 6 tokens, at most 17 pairs, and 2 optimiser"
        in out
    )
    assert "51 prompts sampled (1.5 times the 34 of the data), at most 1224 tokens" in out
    assert "doctor: method online-dpo has no trust region on ratios" in out
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no" if i else "yes"} for i in range(20)]
    write(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "run.yaml").write_text(f"{ours}method: dpo\npairs: pairs.jsonl\n")
    _, err = dry(capsys, status=2)
    assert "1 rows have the same text as chosen and as rejected" in err
    out, _ = dry(capsys, "--bad_rows", "skip")
    assert "19 pairs to train on, 6 held out" in out and "ok column rejected in tokens: median 2, most 2" in out
    assert "the run: 3 optimiser steps of 8 pairs, which is 1.26 times the 19 pairs" in out
    write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b"}])
    _, err = dry(capsys, status=2)
    assert "have no column 'rejected', only prompt, chosen" in err


def test_an_objective_that_needs_what_this_machine_lacks(capsys, monkeypatch):
    monkeypatch.setattr("bandpo.train.needs._installed", lambda package: package != "vllm")
    out, _ = dry(capsys, "--use_vllm", "true")
    assert "# ?? this machine differs: use_vllm=True needs vLLM" in out


def test_the_parameters_of_adapters_are_those_of_peft():
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    model = AutoModelForCausalLM.from_config(config)
    shape = memory.shape_of(model, config, lora_rank=4)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert (shape.attention, shape.keys, shape.inner, shape.vocabulary) == (32, 16, 48, 50)


def test_the_estimate_of_memory():
    shape = memory.Shape(10**9, 10**9, 2048, 16, 8192, 2048, 512, 128_000)
    load = memory.Load(sequences=4, length=1024, sampled=32, on_cpu=False)
    whole = memory.estimate(shape, load)
    assert whole["peak"] == sum(whole[x] for x in ("weights", "gradients", "Adam", "training"))
    assert memory.estimate(shape, load._replace(checkpointing=True))["training"] < 0.4 * whole["training"]
    assert memory.estimate(shape, load._replace(reference=True))["weights"] == 2 * whole["weights"]
    assert memory.estimate(shape, load._replace(half=True))["weights"] == 1.5 * whole["weights"]
    adapter = memory.estimate(shape._replace(trained=10**7), load)
    assert (adapter["gradients"], adapter["Adam"]) == (4e7, 8e7)
    sampled = memory.estimate(shape, load._replace(sampled=4096))
    assert sampled["peak"] == sampled["weights"] + sampled["Adam"] + sampled["sampling"]


def test_the_memory_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "memory.max")
    assert memory.memory_of(Machine(), use_cpu=True)[0] == "this machine"
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.memory_of(Machine(), use_cpu=True)[0] == "this machine"
    (tmp_path / "memory.max").write_text("1048576\n")
    assert memory.memory_of(Machine(), use_cpu=True) == ("this container", 1048576)
    assert memory.memory_of(Machine("mps", "mps"), use_cpu=False) is None
    found = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert memory.memory_of(Machine("cuda", "H100"), use_cpu=False) == ("H100", 80 * 2**30)


def test_a_run_that_needs_more_memory_than_there_is(capsys, monkeypatch):
    monkeypatch.setattr(memory, "memory_of", lambda *_, **__: ("this container", 1.0))
    out, _ = dry(capsys)
    assert "# ?? memory: about " in out and "this container has" in out


def test_a_plan_of_a_run():
    run = RunConfig(task="sums")
    args = parse(["--task", "sums", "--use_cpu", "true", "--bf16", "false", "--dynamic_sampling", "2"]).args
    prompts = args.generation_batch_size // args.num_generations
    assert plan_mistakes(run, args, prompts, 1) == [] != plan_mistakes(run, args, prompts - 1, 1)
    assert "up to 2 times more by dynamic_sampling" in "".join(plan_lines(run, args, 1000, 10))


def test_an_architecture_of_other_names_has_no_estimate(capsys, monkeypatch):
    def fails(*_, **__):
        raise AttributeError("hidden_size")

    monkeypatch.setattr(memory, "shape_of", fails)
    out, _ = dry(capsys)
    assert "-- memory: no estimate for a model of this architecture" in out
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2)
    monkeypatch.undo()
    assert memory.shape_of(torch.nn.Linear(1, 1), config).inner == 128  # its names are mapped by transformers


def test_the_libraries_of_the_hub_are_back_online_after_an_error(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    seen = []

    def fails():
        with validate._offline():
            seen.append(huggingface_hub.constants.HF_HUB_OFFLINE)
            raise KeyError("x")

    with pytest.raises(KeyError):
        fails()
    assert seen == [True] and not huggingface_hub.constants.HF_HUB_OFFLINE
