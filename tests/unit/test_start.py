"""What each command imports before it answers, and the table of the options of `bandpo train`, against TRL's own parser.

The table is compared with the parser that TRL makes of the dataclasses: the same actions, the same values of the same command
lines, the same messages. Seconds are in benchmarks/bench_start.py; here the imports that would cost them are counted.
"""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch

from bandpo.bounds import table as bounds_table
from bandpo.cli import COMMANDS, main
from bandpo.train import options, start
from bandpo.train.config import METHODS, RunConfig, declared_by_trl, parse, read, run_keys

HEAVY = ("torch", "numpy", "transformers", "trl", "datasets", "accelerate", "matplotlib", "scipy", "rich", "jinja2", "pandas",
         "reasoning_gym", "sympy", "pebble")  # fmt: skip
FILES = {
    "log.jsonl": "\n".join(
        json.dumps({"reward": i / 20, "entropy": 2.0, "clip_ratio/region_mean": 0.01}) for i in range(20)
    ),
    "verl.yaml": "actor_rollout_ref: {actor: {policy_loss: {loss_mode: bandpo}}}",
    "unknown.yaml": "task: countdown\nradiuss: 0.1",
    "task.yaml": "task: chess",
}

# Commands with their exit status. These need no package beyond the standard library (and PyYAML, for a YAML file).
WITHOUT_TORCH = [
    ([], 0),
    (["--help"], 0),
    *(([command.name, "--help"], 0) for command in COMMANDS),
    (["--version"], 0),
    (["lab", "preference", "--help"], 0),
    (["lab", "selection", "--help"], 0),
    (["train", "--help-all"], 0),
    (["train", "--method", "dpo", "--help"], 0),
    (["train", "--config", "task.yaml", "--help"], 0),
    (["trian"], 2),
    (["bounds", "--raduis", "1"], 2),
    (["train", "--radiu", "1"], 2),
    (["train", "--seed", "x"], 2),
    (["train", "--seed"], 2),
    (["train", "--learning-rate", "fast"], 2),
    (["train", "--config", "none.yaml"], 2),
    (["train", "--config", "unknown.yaml"], 2),
    (["train", "--config", "task.yaml"], 2),
    (["train", "--method", "dpo", "--objective", "ipo"], 2),
    (["train", "--task", "chess"], 2),
    (["train", "--model", "x"], 2),
    (["train", "--reward_errors", "ignore"], 2),
    (["evaluate", "/no/such/model"], 2),
    (["evaluate", "x", "--task", "chess"], 2),
    (["evaluate", "x", "--samples", "0"], 2),
    (["doctor", "none.jsonl"], 2),
    (["doctor", "log.jsonl", "--processes", "0"], 2),
    (["doctor", "log.jsonl"], 0),
    (["doctor", "log.jsonl", "--json"], 0),
]  # fmt: skip
# These need torch, and nothing else of weight; above all not its compiler, which takes as long as torch itself.
WITH_TORCH_ALONE = [(["objectives"], 0), (["bounds", "--no-figure"], 0), (["doctor", "verl.yaml"], 0)]
BEYOND_TORCH = [*(name for name in HEAVY if name not in ("torch", "numpy")), "torch._dynamo", "torch._inductor"]


@pytest.mark.parametrize(
    ("commands", "heavy"), [(WITHOUT_TORCH, HEAVY), (WITH_TORCH_ALONE, BEYOND_TORCH)], ids=["no torch", "torch alone"]
)
def test_what_a_command_imports(commands, heavy, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(f"{text}\n")
    code = f"""
import contextlib, io, sys
from bandpo.cli import main
for arguments, expected in {commands}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
    found = [name for name in {heavy} if name in sys.modules]
    assert not found, f"{{arguments}} imports {{found}}"
    assert (status or 0) == expected, (arguments, status, error.getvalue())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_mark_of_a_constant_is_that_of_torch():
    """The core sets it without torch's decorator, which imports the compiler."""

    def function():
        pass

    assert vars(torch.compiler.assume_constant_result(function)) == vars(bounds_table._constant_table) != {}


# ---- the table against TRL's parser

PARTS = ("option_strings", "dest", "nargs", "const", "default", "help", "required")
LINES = [
    "--task countdown --beta 0.1",
    "--task chain_sum --no_shuffle_dataset --packing --relax false --seed=7",
    "--model m --dataset d --reward math --eval_temperature none --threads NULL --lora-rank 8",
    "--learning-rate 1e-6 --report_to none --gradient_checkpointing f --eval_prompts 3",
    "--task countdown --no-gradient-checkpointing --include-for-metrics loss inputs --warmup_steps 0.1",
]
BAD = [
    "--seed x",
    "--seed",
    "--eval_temperature hot",
    "--weight-decay=",
    "--reward_timeout 1s",
    "--threads 1.5",
    "--task",
]


@pytest.fixture(scope="module", params=["grpo", "dpo"])
def both(request):
    """The options of a method as TRL's parser has them, and as the table has them."""
    return declared_by_trl(request.param), options.declared_in(options.load_table(), request.param)


def test_the_table_in_the_package_is_up_to_date():
    """If it fails: `python tools/options.py`."""
    table = options.make_table()
    kept = json.loads(options.PACKAGED.read_text(encoding="utf-8"))
    if kept["versions"] != options.installed_versions():
        pytest.skip(f"the table is that of {kept['versions']}")
    assert options.as_text(table) == options.PACKAGED.read_text(encoding="utf-8")
    assert "train/config.py" in table["declarations"] and len(table["declarations"]) >= 5


def test_the_table_has_the_actions_of_trls_parser(both):
    real, ours = ([a for a in declared.parser._actions if a.dest != "help"] for declared in both)
    assert len(real) == len(ours) > 150
    for a, b in zip(real, ours, strict=True):
        assert [getattr(a, part) for part in PARTS] == [getattr(b, part) for part in PARTS]
        assert (a.choices and list(map(str, a.choices))) == b.choices
        assert type(a).__name__ == type(b).__name__
    assert both[0].floats == both[1].floats


@pytest.mark.parametrize("line", LINES)
def test_a_line_has_the_same_values(both, line):
    real, ours = both
    if "GRPO" not in str(real.parser.dataclass_types) and "shuffle" in line:
        pytest.skip("an option of GRPO")
    expected, found = vars(real.parser.parse_args(line.split())), options.parsed(ours, line.split())
    assert found is not None and set(found) == set(expected)
    kinds = {row["name"]: row.get("type") for row in options.load_table()["grpo"]}
    for name, value in found.items():
        if name in run_keys() or kinds.get(name):  # other types stay text here, and TRL's parser reads them
            assert value == expected[name], name


@pytest.mark.parametrize("line", BAD)
def test_a_bad_value_has_the_same_message(both, line):
    messages = []
    for parse_line in (both[0].parser.parse_args, lambda x: options.parsed(both[1], x)):
        with pytest.raises(ValueError) as refused:
            parse_line(line.split())
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("argument --")


@pytest.mark.parametrize("line", ["--optim x", "--bf16 perhaps", "--task countdown more", "--logging_strategy never"])
def test_trls_parser_decides_about_other_values(both, line):
    assert options.parsed(both[1], line.split()) is None


@pytest.mark.parametrize("line", [
    "--radiu 1", "--radius 1 --sed 3", "--task chess", "--model x", "--dataset y", "--eval_prompts 0", "--method ppo",
    "--method dpo --resample true", "--method rebel --labels probe --objective x", "--bad_rows maybe", "--reward_timeout 0",
    "--config none.yaml", "--config", "--config unknown.yaml", "--config task.yaml", "--config hidden.yaml",
    "--config rate.yaml", "--config list.yaml", "--method dpo --radius 1", "--task countdown --lora_rank -1",
])  # fmt: skip
def test_a_mistake_is_the_same_as_after_trls_parser(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"hidden.yaml": "hub_token: <hidden>", "rate.yaml": "learning_rate: fast", "list.yaml": "- a", **FILES}
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    messages = []
    for function in (parse, start.train):
        with pytest.raises(ValueError) as error:
            function(line.split())
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_run_is_given_its_command_line_unchanged(monkeypatch):
    from bandpo.train import command

    given = []
    monkeypatch.setattr(command, "train", given.append)
    for line in ("--seed 5", "--method dpo", "--bf16 perhaps", "--model x --dataset y --reward math"):
        start.train(line.split())
        assert given.pop() == line.split()


# ---- a table belongs to versions and sources


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The tables that were made, where TRL is another one than that of the package's table."""
    count = []
    packaged = json.loads(options.PACKAGED.read_text(encoding="utf-8"))
    versions = {**packaged["versions"], "trl": "1.99.0"}
    monkeypatch.setattr(options, "installed_versions", lambda: versions)
    monkeypatch.setattr(options, "make_table", lambda: count.append(1) or {**packaged, "versions": versions})
    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path / "cache"))
    return count


def test_another_version_has_a_table_of_its_own_which_is_kept(made, tmp_path, monkeypatch):
    assert options.load_table()["versions"]["trl"] == "1.99.0"
    assert options.load_table()["versions"]["trl"] == "1.99.0"
    assert len(made) == 1
    (kept,) = (tmp_path / "cache").iterdir()
    assert "1.99.0" in kept.name
    kept.write_text(kept.read_text().replace("--radius", "--radios"))  # damaged
    assert options.load_table()["versions"]["trl"] == "1.99.0" and len(made) == 2
    real = options.declarations
    monkeypatch.setattr(options, "declarations", lambda path: real(path) + 1)  # an option has changed in the source
    options.load_table()
    assert len(made) == 3


def test_without_a_cache_the_table_is_made_each_time(made, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path / "file"))
    options.load_table(), options.load_table()
    assert len(made) == 2
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.delitem(sys.modules, "bandpo._system.cache", raising=False)
    options.load_table()
    assert len(made) == 3


def test_a_field_changes_the_declarations_and_other_code_does_not(tmp_path):
    def number(text):
        (tmp_path / "x.py").write_text(text)
        return options.declarations(tmp_path / "x.py")

    base = number("class A:\n    a: int = 3\n\n    def f(self):\n        return 1\n")
    assert base == number("# new\nclass A:\n    a: int = 3\n\n    def f(self):\n        return 2\n")
    assert len({base, number("class A:\n    a: int = 4\n"), number("class A:\n    a: int = 3\n    b: str = ''\n")}) == 3
    assert number("x = 1\n") == 0


# ---- the help


def shown(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    assert not ended.value.code
    return out.getvalue()


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_ours_and_help_all_shows_all(method):
    table = options.load_table()
    rows = table["grpo" if method == "grpo" else "preference"]
    short, every = shown("--method", method, "--help"), shown("--help-all", "--method", method)
    for row in rows:
        listed = row["group"] != "trl" or row["name"] in options.MOST_USED
        assert (f"  {row['options'][0]} " in short or f"  {row['options'][0]}\n" in short) == (listed), row["name"]
        assert all(
            f"{option} " in every or f"{option}\n" in every or f"{option}," in every for option in row["options"]
        )
    assert short.count("\n") < every.count("\n") / 2
    assert "--config FILE.yaml" in short and "--help-all" in short
    assert every.index("--objective") < every.index("--learning_rate")


def test_the_most_used_options_are_trls():
    groups = {row["name"]: row["group"] for row in options.load_table()["grpo"]}
    assert {groups[name] for name in options.MOST_USED} == {"trl"}


def test_read_gives_the_request():
    table = options.load_table()
    request = read(["--config=", "--seed", "3"][1:], lambda method: options.declared_in(table, method))
    assert request.method == "grpo" and request.chosen == {"seed"} and request.given["task"] == "countdown"
    request.set_defaults()
    values = options.parsed(request.declared, request.arguments)
    assert values["seed"] == 3 and values["num_generations"] == 8
    assert RunConfig(**{name: values[name] for name in run_keys()}).task == "countdown"


def test_a_table_of_an_older_bandpo_in_the_cache_is_made_again(made, tmp_path):
    options.load_table()
    (kept,) = (tmp_path / "cache").iterdir()
    old = {key: value for key, value in json.loads(kept.read_text()).items() if key not in ("objectives", "crc32")}
    options.write_checked_json(kept, old)
    assert "objectives" in options.load_table() and len(made) == 2


def test_without_trl_the_table_is_that_of_the_package(made, monkeypatch):
    monkeypatch.setattr(options, "installed_versions", lambda: {"torch": "2.13.0"})
    assert options.load_table() == options.packaged_table() and not made
