"""The card of a model: it names the objective of the run and the paper of that objective, and its metadata can be read."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from bandpo import OBJECTIVES, Clip, Objective
from bandpo._system import citation
from bandpo.cli import main
from bandpo.preference import PREFERENCES
from bandpo.train.card import Base, Facts, base_of, card_text, data_rows, finish_card, papers_of, write_card
from bandpo.train.config import RunConfig
from bandpo.train.wheels import WHEELS

EVALUATION = {
    "before": {"mean@8": 0.25, "pass@1": 0.25, "pass@8": 0.5},
    "after": {"mean@8": 0.5, "pass@1": 0.5, "pass@8": 0.75},
    "change": {"value": 0.25, "low": 0.125, "high": 0.375},
    "prompts": 256,
    "samples": 8,
    "temperature": 1.0,
    "top_p": 1.0,
}


def facts(objective, **changes):
    name = objective.name
    given = {
        "folder": Path("runs/a"), "method": name, "asked": name, "objective": objective,
        "base": Base("org/base", "org/base", "org/base", "apache-2.0"), "adapter": False, "chat": True,
        "data": "org/data", "hub_data": ("org/data",), "rows": {"seed": 3},
    }  # fmt: skip
    return Facts(**(given | changes))


def read(text, tmp_path):
    """The card as the Hub's own reader finds it: metadata that can be parsed, and the text."""
    path = tmp_path / "README.md"
    path.write_text(text)
    card = ModelCard.load(path)
    assert yaml.safe_load(text.split("---\n")[1]) == card.data.to_dict()
    return card.data, card.text


@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), *PREFERENCES.values()], ids=lambda o: o.name)
def test_every_objective_has_its_own_name_and_paper(objective, tmp_path):
    data, text = read(card_text(facts(objective), EVALUATION), tmp_path)
    assert objective.name in data.tags and f"# a: {objective.name} on org/data" in text
    assert f"`{objective.name}` is the objective." in text
    own = re.findall(r"\d{4}\.\d{5}", objective.paper)
    named = set(re.findall(r"\b\d{4}\.\d{5}\b", text))
    assert named == set(own)
    for number in own:
        assert f"[arXiv:{number}](https://arxiv.org/abs/{number})" in text
        assert text.count(f"    eprint        = {{{number}}},") == 1
    assert (citation.bibtex() in text) == (citation.ARXIV in own)
    assert ("bandpo's own" in text) == ("our own" in objective.paper)
    assert "our own" not in text and " at 0x" not in text and "None]" not in text
    entries = re.findall(r"```bibtex\n(.*?)\n```", text, re.DOTALL)
    assert len(entries) == max(1, len(own)) + 1
    for entry in entries:
        assert entry.count("{") == entry.count("}")
        assert entry.startswith("%") or re.match(r"@\w+\{[\w-]+,\n", entry)


def test_options_of_the_run_are_those_that_it_had(tmp_path):
    objective = OBJECTIVES["bandpo-kl"].with_radius(0.11)
    _, text = read(card_text(facts(objective), EVALUATION), tmp_path)
    assert "| radius | 0.11 |" in text and "| bounds | Band(KL, radius=0.11, max_ratio=10.0) |" in text
    _, text = read(card_text(facts(PREFERENCES["simpo"].replace(beta=3.0))), tmp_path)
    assert "| link | log |" in text.lower() and "| beta | 3.0 |" in text and "| margin | 0.5 |" in text
    _, text = read(card_text(facts(OBJECTIVES["dual-clip"])), tmp_path)
    assert "| surrogate | dual_clip(c=3.0) |" in text and "| radius |" not in text
    assert "The run had not ended when this card was written." in text


def test_an_objective_of_the_user_is_said_to_be_one(tmp_path):
    mine = Objective(bounds=Clip(0.1), name="mine")
    data, text = read(card_text(facts(mine, method="pkg.mod:MINE", asked="pkg.mod:MINE"), EVALUATION), tmp_path)
    assert "`pkg.mod:MINE` is the user's own objective" in text and "No source is stated for it." in text
    assert not [tag for tag in data.tags if ":" in tag]
    assert len(re.findall("```bibtex", text)) == 1  # TRL's


def test_a_method_of_preferences_has_its_own_name(tmp_path):
    data, text = read(card_text(facts(PREFERENCES["dpo"], method="online-dpo"), EVALUATION), tmp_path)
    assert text.lstrip().startswith("# a: online-dpo on org/data")
    assert "`dpo` is the objective of the method `online-dpo`." in text
    assert {"dpo", "online-dpo"} <= set(data.tags)


def test_one_row_where_two_names_are_of_one_number():
    text = card_text(facts(OBJECTIVES["grpo"]), EVALUATION)
    assert "| mean@8 | 0.250 | 0.500 | +0.250 |" in text and "pass@1" not in text
    assert "mean@8 changed by +0.250, 95% interval [+0.125, +0.375]" in text
    other = EVALUATION | {"after": EVALUATION["after"] | {"pass@1": 0.75}}
    assert "| pass@1 | 0.250 | 0.750 |" in card_text(facts(OBJECTIVES["grpo"]), other)


def test_the_base_model_and_its_licence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "base"
    folder.mkdir()
    assert base_of("base", str(folder)) == Base("base", str(folder))
    (folder / "LICENSE").write_text("text")
    assert base_of("base", str(folder)).licence == "see the file LICENSE of the base model"
    (folder / "config.json").write_text(json.dumps({"license": "gemma"}))
    assert base_of("base", str(folder)).licence == "gemma"
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\n---\n# Base\n")
    assert base_of("base", str(folder)).licence == "llama3"
    for damaged in ("---\nlicense: [\n---\n", "---\nlicense: 3\n---\n", "no metadata"):
        (folder / "README.md").write_text(damaged)
        assert base_of("base", str(folder)).licence == "gemma"
    assert base_of("wheel:smollm2", str(folder)).hub == WHEELS["smollm2"].hub
    assert base_of("org/none", "org/none") == Base("org/none", "org/none", "org/none")
    data, text = read(card_text(facts(OBJECTIVES["grpo"], base=Base("./base", "./base"))), tmp_path)
    assert data.base_model is None and "`./base`. Licence of the base model: not stated" in text
    data, text = read(card_text(facts(OBJECTIVES["grpo"])), tmp_path)
    assert data.base_model == "org/base" and "Licence of the base model: apache-2.0." in text
    assert data.license is None  # that of the new model is for its author to say
    _, text = read(card_text(facts(OBJECTIVES["grpo"], base=Base(None, "cache"))), tmp_path)
    assert "a small character-level Llama model" in text and "Licence" not in text


def test_the_code_that_loads_it_is_for_what_was_saved():
    whole = card_text(facts(OBJECTIVES["grpo"]))
    assert "AutoModelForCausalLM.from_pretrained('runs/a/model')" in whole and "Peft" not in whole
    adapter = card_text(facts(OBJECTIVES["grpo"], adapter=True, chat=False))
    assert "PeftModel.from_pretrained(base, 'runs/a/model')" in adapter and "apply_chat_template" not in adapter
    for text in (whole, adapter):
        [code] = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
        compile(code, "card", "exec")


def test_the_card_of_an_adapter_names_the_model_on_the_hub(tmp_path):
    what = facts(
        OBJECTIVES["grpo"], folder=tmp_path, adapter=True, base=Base("wheel:smollm2", "/cache/folder", "org/hub")
    )
    write_card(what, EVALUATION, ["From step 2 on the run had other settings"])
    path = tmp_path / "model" / "README.md"
    card = ModelCard.load(path)
    card.data.base_model, card.data.tags = "/cache/folder", ["base_model:adapter:/cache/folder", "lora"]  # as PEFT does
    card.save(path)
    finish_card(what)
    data = ModelCard.load(path).data
    assert data.base_model == "org/hub" and data.library_name == "peft"
    assert data.tags == ["bandpo", "base_model:adapter:org/hub", "grpo", "lora", "trl"]
    assert "From step 2 on the run had other settings." in path.read_text()


def test_secrets_and_control_characters_stay_out():
    rows = {"system prompt": "a\x1b[31m|b\nhub_token=hf_abcdefghijklmnopqrstuvwxyz"}
    text = card_text(facts(OBJECTIVES["grpo"], rows=rows, folder=Path("r\x1bn")))
    assert "\x1b" not in text and "hf_abcdef" not in text and "a\\x1b[31m∣b" in text


def test_the_data_of_a_run():
    run = RunConfig(
        model="m", dataset="org/data", dataset_split="train[:10%]", reward="math", prompt_column="q",
        answer_column="r.a", system_prompt="S", eval_dataset="test.jsonl",
    )  # fmt: skip
    assert data_rows(run, training=5, held_out=2) == {
        "data": "org/data, split train[:10%]", "columns": "q (prompt), r.a (answer)", "system prompt": "S",
        "data of the evaluation": "test.jsonl", "trained on": "5 prompts", "evaluated on": "2 prompts",
    }  # fmt: skip
    pairs = data_rows(RunConfig(method="dpo", task="countdown", pairs="p.jsonl"), training=5, held_out=2)
    assert pairs["pairs"] == "p.jsonl" and pairs["trained on"] == "5 pairs"
    assert papers_of("no number") == []


SMALL = [
    *("--task", "sums", "--warm_up_steps", "60", "--eval_prompts", "8", "--eval_samples", "2"),
    *("--report_to", "none", "--use_cpu", "true", "--bf16", "false"),
]


def test_runs_of_preferences_are_titled_by_their_method(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path / "cache"))
    more = ["--rounds", "2", "--prompts_per_round", "32", "--samples_per_prompt", "8", "--max_steps", "2"]
    more += ["--generation_batch_size", "64", "--per_device_eval_batch_size", "64", "--max_completion_length", "6"]
    assert main(["train", "--method", "online-dpo", *SMALL, *more, "--output_dir", "out"]) == 0
    said = capsys.readouterr().out
    assert "online-dpo on sums -> out" in said and "online-dpo on sums, seed" in said
    assert not re.search(r"(?<!online-)dpo on sums", said)
    assert "online-dpo on sums, seed" in Path("out/report.html").read_text()
    card = Path("out/model/README.md").read_text()
    assert card == Path("out/README.md").read_text()
    for line in (
        "# out: online-dpo on sums", "[arXiv:2305.18290](", "| rounds | 2 |", "| optimiser steps of each round | 2 |",
        "| link | log |", "| task | sums |",
    ):  # fmt: skip
        assert line in card.replace("LOG", "log"), line
    assert "2603.04918" not in card and "Model Card for" not in card
