"""The JSON schema of the YAML files of `bandpo train`: the same keys as the parser, and wrong values fail."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from bandpo.cli import main
from bandpo.train.config import METHODS, read
from bandpo.train.options import declared_in, packaged_table
from bandpo.train.schema import schema_of

ROOT = Path(__file__).parents[2]
SCHEMA = schema_of(packaged_table())
CHECK = jsonschema.Draft7Validator(SCHEMA)


def faults(content):
    return [error.message for error in CHECK.iter_errors(content)]


def test_the_command_prints_it(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--schema"])
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(SCHEMA))
    jsonschema.Draft7Validator.check_schema(printed)


FILES = [*(ROOT / "src/bandpo/configs").glob("*.yaml"), *(ROOT / "src/bandpo/recipes/trl").glob("paper*.yaml")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_that_ship_are_valid(path):
    content = yaml.safe_load(path.read_text())
    if "preference" in path.name:  # the default job of a method, which the command line names
        content["method"] = "dpo" if "offline" in path.name else "online-dpo"
    assert faults(content) == []
    assert faults({**content, "radiuss": 1})


@pytest.mark.parametrize("method", METHODS)
def test_the_keys_are_those_of_the_parser(method, tmp_path):
    table = packaged_table()
    every = {row["name"] for rows in (table["grpo"], table["preference"]) for row in rows}
    for name in sorted({*every, "radiuss", "help", "config", "preset"} - {"method"}):
        (tmp_path / "run.yaml").write_text(f"method: {method}\n{name}:\n")
        try:
            read(["--config", str(tmp_path / "run.yaml")], lambda m: declared_in(table, m))
        except ValueError:
            known = False
        else:
            known = True
        messages = faults({"method": method, name: None})
        refused = [m for m in messages if "Additional properties" in m or "False schema" in m]
        assert bool(refused) != known, (name, messages)


@pytest.mark.parametrize(
    "text",
    [
        "learning_rate: 1e-6", "learning_rate: 1", "radius: null", "objective: my.module:NAME", "reward: math", "task: null",
        "reward: [math, 'my:format']\nreward_weights: [1.0, 0.2]", "report_to: [tensorboard, trackio]", "report_to: none",
        "pruning: {completions: 0.5}", "pruning: '{\"completions\": 0.5}'", "model_init_kwargs: {dtype: bfloat16}",
        "save_strategy: 'no'", "method: dpo\nrounds: 3", "method: rbrm\nprobe_prompts: 8", "{}",
    ],
)  # fmt: skip
def test_right_values_are_valid(text):
    assert faults(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "learning_rate: fast", "seed: x", "seed: 1.5", "bf16: 'yes'", "objective: bandpo", "objective: dpo", "task: chess",
        "method: ppo", "reward: []", "reward: [1]", "bad_rows: maybe", "lr_scheduler_type: square", "max_steps: true",
        "method: dpo\nobjective: ipo", "method: dpo\nradius: 0.1", "rounds: 3", "- a", "model: 3", "save_strategy: no",
    ],
)  # fmt: skip
def test_wrong_values_are_not(text):
    assert faults(yaml.safe_load(text))


def test_every_key_has_a_description_and_nearly_all_a_type():
    properties = SCHEMA["definitions"]["grpo"]["properties"] | SCHEMA["definitions"]["preference"]["properties"]
    assert all(p.get("description") for p in properties.values())
    assert [n for n, p in properties.items() if not {"type", "enum", "anyOf"} & set(p)] == ["parallelism_config"]
