"""Own objectives in `bandpo compare`: found in every process, recorded, and refused where they have changed."""

import dataclasses
import functools
import importlib
import json
import re
import subprocess
import sys
import types

import pytest
import torch

from bandpo import JS, KL, OBJECTIVES, Band, Clip, Objective, traits
from bandpo.cli import main
from bandpo.divergences import FDivergence
from bandpo.lab.comparison import own, plan, study
from bandpo.lab.comparison.command import _on_bandits
from bandpo.lab.comparison.definitions import fingerprint, in_words
from bandpo.lab.comparison.loop import Loop, Run
from bandpo.lab.comparison.own import check_unchanged, definition_of, definitions_of, objective_of, recorded
from bandpo.lab.comparison.plan import PRESETS, Arm, Job, Plan, jobs_of, left_out, report_arms, tuning_arms
from bandpo.lab.comparison.study import Study
from bandpo.lab.comparison.trial import check_computable, looks_at_neighbours, why_not_on_bandits

MINE = "own_objective:MINE"

SOURCE = """
import torch
from bandpo import Clip, Objective, traits
from bandpo.bounds import RatioBounds
import helpers_of_mine as h

SCALE = {"a": 1.0}

class Edge:
    low = 0.2

    def __init__(self, high):
        self.high = high

    def __call__(self, old_logprobs):
        one = torch.ones_like(old_logprobs) * SCALE["a"]
        return RatioBounds(one - self.low, one + h.widened(self.high))

def surrogate(log_ratio, advantages, bounds, floor=0.0):
    "What happens at the edge."
    names = {"x", "y", "z"}
    r = log_ratio.exp()
    return torch.minimum(r * advantages, r.clamp(bounds.lower, bounds.upper) * advantages) + floor * ("x" in names)

OWN = Objective(bounds=Edge(0.28), surrogate=surrogate, name="own")
"""
HELPERS = """
FACTOR = 1.5

def widened(x):
    return x * FACTOR
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes the two modules into the current folder, and imports the objective anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(source=SOURCE, helpers=HELPERS):
        for name, text in (("objective_of_mine", source), ("helpers_of_mine", helpers)):
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        forget()
        importlib.invalidate_caches()
        return objective_of("objective_of_mine:OWN")

    yield write
    for name in ("objective_of_mine", "helpers_of_mine"):
        sys.modules.pop(name, None)
    forget()


def forget():
    for function in (own.objective_of, own.definition_of, plan.cannot_be):
        function.cache_clear()


def test_a_fingerprint_is_that_of_values_and_code(written):
    first = fingerprint(written())
    for old, new in (
        ("0.28", "0.29"),
        ("low = 0.2", "low = 0.3"),
        ('{"a": 1.0}', '{"a": 1.1}'),
        ("floor=0.0", "floor=0.1"),
        ("one + h.widened", "one * h.widened"),
        ('("x" in names)', '("y" in names)'),
        ('name="own"', 'name="own", aggregation="token-sum"'),
        ("def surrogate", "@traits('of_batch')\ndef surrogate"),
    ):
        assert SOURCE.count(old) == 1, old
        assert fingerprint(written(SOURCE.replace(old, new))) != first, new
    for old, new in (("1.5", "1.6"), ("x * FACTOR", "x + FACTOR")):
        assert fingerprint(written(helpers=HELPERS.replace(old, new))) != first, new
    for old, new in (
        ("def surrogate", "# a comment\n\ndef surrogate"),
        ("What happens at the edge.", "Other words."),
        ('name="own"', 'name="other", paper="none"'),
    ):
        assert SOURCE.count(old) == 1, old
        assert fingerprint(written(SOURCE.replace(old, new))) == first, new


def test_a_fingerprint_is_the_same_in_every_process(written, tmp_path):
    """Also with another seed of hashes, which decides the order of sets."""
    code = (
        "from bandpo.lab.comparison.own import definition_of; print(definition_of('objective_of_mine:OWN').fingerprint)"
    )
    here = fingerprint(written(), "objective_of_mine:OWN")
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert made.stdout.strip() == here


def test_a_fingerprint_knows_tensors_partials_closures_and_its_own_tail():
    def surrogate(log_ratio, advantages, bounds, c=1.0):
        return log_ratio.exp() * advantages * c

    def closed(c):
        return lambda log_ratio, advantages, bounds: log_ratio.exp() * advantages * c

    def of(**fields):
        return fingerprint(Objective(**{"bounds": Clip(0.2), **fields}))

    surrogate.__module__ = "objective_of_mine"
    several = [
        of(),
        of(bounds=Band(KL, torch.tensor(0.05))),
        of(bounds=Band(KL, torch.tensor(0.06))),
        of(bounds=Band(FDivergence("mine", f=lambda u: (u - 1) ** 2), 0.05)),
        of(bounds=Band(FDivergence("mine", f=lambda u: (u - 1) ** 4), 0.05)),
        of(surrogate=surrogate),
        of(surrogate=functools.partial(surrogate, c=2.0)),
        of(surrogate=functools.partial(surrogate, c=3.0)),
        of(surrogate=closed(1.0)),
        of(surrogate=closed(2.0)),
    ]
    assert len(set(several)) == len(several)
    assert of(bounds=Band(KL, torch.tensor(0.05))) == several[1] and of(surrogate=closed(2.0)) == several[-1]
    tail = types.SimpleNamespace()
    tail.tail = tail
    surrogate.tail = [surrogate, tail]  # a walk that met it again would not end
    assert re.fullmatch("[0-9a-f]{20}", of(surrogate=surrogate))
    assert len({fingerprint(o) for o in OBJECTIVES.values()}) == len(OBJECTIVES)


def test_an_own_objective_has_arms_a_grid_and_keys_of_its_own():
    small = Plan(objectives=("grpo", MINE))
    arms = report_arms(small)
    assert [a.label for a in arms] == ["grpo", MINE, "no-clip", f"{MINE} matched"]
    assert arms[1].build() == objective_of(MINE) == Objective(bounds=Band(JS, 0.02), name="mine")
    assert len(tuning_arms(small, MINE)) == len(tuning_arms(small, "grpo")) == 6
    assert Arm(MINE, "tuned", 3.0).build().bounds == Band(JS, 0.06)
    assert left_out(small) == []
    assert set(definitions_of(small.objectives)) == {MINE}


def test_the_key_of_a_run_has_the_definition(monkeypatch):
    job = Job(PRESETS["quick"].setting_of("paths"), Arm(MINE), 4e-4, 0, 0)
    first = job.key
    other = definition_of(MINE)._replace(fingerprint="0" * 20)
    monkeypatch.setattr(plan, "definition_of", lambda _: other)
    assert job.key != first


def test_an_arm_that_cannot_be_built_is_left_out_and_said(written):
    """A divergence that is 0 around the ratio 1 has no ball with PPO's bound."""
    source = """
from bandpo import Band, Objective
from bandpo.divergences import FDivergence
OWN = Objective(bounds=Band(FDivergence("gap", f=lambda u: ((u - 1).abs() - 0.5).clamp(min=0)), 0.05))
"""
    written(source)
    small = dataclasses.replace(PRESETS["smoke"], objectives=("grpo", "objective_of_mine:OWN"))
    assert "objective_of_mine:OWN matched" not in [a.label for a in report_arms(small)]
    [line] = left_out(small)
    assert line.startswith("objective_of_mine:OWN matched: left out (")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_objective:NOT_ONE", "own_objective:NOT_ONE is no Objective"),
        ("own_objective:NOTHING", "has no 'NOTHING'"),
        ("no_such_module:X", "No module named 'no_such_module'"),
        ("own objective:X", "write package.module:NAME"),
        ("a:b:c", "write package.module:NAME"),
        (":X", "write package.module:NAME"),
        ("../x:X", "write package.module:NAME"),
    ],
)
def test_what_is_no_objective_is_one_line(name, words, capsys, tmp_path):
    assert main(["compare", "--objectives", f"grpo,{name}", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("log_ratio @ advantages", "cannot be computed on a small batch: its code raised .* in surrogate"),
        ("exit(3)", r"called sys.exit\(3\)"),
        ("(log_ratio * 0).log()", "gives no number on a small batch"),
        ("advantages + 0 * log_ratio.detach()", "cannot be computed on a small batch"),
    ],
)
def test_a_mistake_in_the_code_ends_the_command_at_once(body, words, written, capsys):
    source = f"""
from bandpo import Clip, Objective
def surrogate(log_ratio, advantages, bounds):
    return {body}
OWN = Objective(bounds=Clip(0.2), surrogate=surrogate)
"""
    written(source)
    assert main(["compare", "--preset", "smoke", "--objectives", "objective_of_mine:OWN", "--output", "out"]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_every_named_objective_can_be_computed_on_the_small_batch():
    from bandpo.lab.comparison.top import has_inputs

    for name in OBJECTIVES:
        if has_inputs(OBJECTIVES[name]):
            check_computable(name)


def test_what_mixes_the_seeds_is_not_on_the_bandit():
    def centred(log_ratio, advantages, bounds):
        r = log_ratio.exp()
        return r * advantages - 0.01 * (r * advantages).mean()

    def alone(log_ratio, advantages, bounds):
        return log_ratio.exp() * advantages - 0.01 * log_ratio

    def drawn(log_ratio, advantages, bounds):
        return log_ratio.exp() * advantages * torch.rand_like(log_ratio)

    found = [looks_at_neighbours(Objective(bounds=Clip(0.2), surrogate=s)) for s in (centred, alone, drawn)]
    assert found == [True, False, True]
    assert looks_at_neighbours(Objective(bounds=Clip(0.2), surrogate=traits("of_batch")(alone)))
    said = []
    assert _on_bandits(["grpo", MINE, "bapo", "gspo"], said.append) == ["grpo", MINE]
    assert [line.partition(":")[0].split()[0] for line in said] == ["bapo", "gspo"]
    for preset in PRESETS.values():
        assert [name for name in preset.objectives if why_not_on_bandits(name)] == []


def test_the_runs_of_a_stack_are_computed_one_by_one():
    """So that an objective that looks at its whole batch sees the batch of its run alone, and code may branch on values."""

    def branching(log_ratio, advantages, bounds):
        r = log_ratio.exp()
        return r * advantages - (0.1 if float(r.detach().mean()) > 1 else 0.2) * r.mean() * torch.ones_like(r)

    objective = Objective(bounds=Clip(0.2), surrogate=branching)
    setting = PRESETS["smoke"].setting_of("paths", updates=2, warm_up_steps=1)
    runs = [Run(objective, 1e-3, seed=seed) for seed in (0, 1)]
    both, alone = Loop(setting, runs).train(), Loop(setting, runs[1:]).train()
    assert both[1].rewards == alone[0].rewards
    assert both[1].entropy == pytest.approx(alone[0].entropy, rel=1e-4)


def test_own_objectives_are_in_stacks_of_their_own_and_others_are_cut_as_before(tmp_path):
    small = dataclasses.replace(PRESETS["smoke"], objectives=("grpo", "bandpo-kl", MINE), tuning_seeds=0)
    made = Study(tmp_path, workers=2, say=lambda _: None)
    named = jobs_of(small, "paths", [Arm("grpo"), Arm("bandpo-kl"), Arm("no-clip")], range(7))
    assert made._stacks(named) == [named[:11], named[11:]]
    mine = jobs_of(small, "paths", [Arm(MINE)], range(7))
    mixed = [job for pair in zip(named, mine, strict=False) for job in pair] + named[7:]
    assert made._stacks(mixed) == [named[:11], named[11:], mine[:4], mine[4:]]


def test_a_worker_refuses_another_definition(monkeypatch):
    make = own.with_definitions(abs, [MINE, "grpo"])
    assert make(-3) == 3 and own.with_definitions(abs, ["grpo"]) is abs
    changed = definition_of(MINE)._replace(fingerprint="0" * 20)
    monkeypatch.setattr(own, "definition_of", lambda _: changed)
    with pytest.raises(ValueError, match="own_objective:MINE was changed while the comparison was running"):
        make(-3)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"own_objectives": 3}', '{"own_objectives": {"a:b": {}}}', "{}"])
def test_a_plan_that_records_nothing_or_is_damaged_is_no_record(text, tmp_path):
    assert recorded(tmp_path) == {}
    (tmp_path / "plan.json").write_text(text)
    assert recorded(tmp_path) == {}


def test_a_changed_definition_is_named(tmp_path):
    now = definition_of(MINE)
    check_unchanged([MINE, "grpo"], {MINE: now, "other:X": now}, tmp_path)
    for then, words in (
        (
            now._replace(fingerprint="0" * 20, words="Objective(bounds=Clip(low=0.2, high=0.2))"),
            "it was Objective.*, and is Obj",
        ),
        (now._replace(fingerprint="0" * 20), "the code that it runs is another one"),
        (now._replace(fingerprint="0" * 20, python="3.9"), "it was compiled by Python 3.9, and is by Python"),
    ):
        with pytest.raises(ValueError, match=words):
            check_unchanged([MINE], {MINE: then}, tmp_path)


def test_words_have_what_differs_from_the_usual():
    words = in_words(OBJECTIVES["no-clip"])
    assert words.startswith(
        "Objective(bounds=Clip(low=1.0, high=inf), aggregation='seq-mean-token-mean', name='no-clip', "
    )
    assert in_words(Objective(bounds=Clip(0.2))) == "Objective(bounds=Clip(low=0.2, high=0.2))"
    assert "0x" not in in_words(Objective(bounds=Clip(0.2), surrogate=lambda log_ratio, advantages, bounds: log_ratio))


def test_a_comparison_with_an_own_objective_from_its_plan_to_its_report_and_again(
    written, monkeypatch, capsys, tmp_path
):
    written()
    name = "objective_of_mine:OWN"
    small = dataclasses.replace(PRESETS["smoke"], tuning_seeds=0, exact_seeds=20, sweep_seeds=0)
    monkeypatch.setattr("bandpo.lab.comparison.command.PRESETS", {"smoke": small})
    command = ["compare", "--preset", "smoke", "--objectives", f"grpo,{name}", "--seeds", "0,1", "--updates", "1"]
    command += ["--jobs", "1", "--output", "out"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{name} is imported, since --objectives names it: Objective(bounds=" in said
    folder = tmp_path / "out"
    planned = json.loads((folder / "plan.json").read_text())
    assert planned["objectives"] == ["grpo", name]
    assert planned["own_objectives"][name]["fingerprint"] == definition_of(name).fingerprint
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["tasks"]["paths"]["table"]) == {"grpo", name, "no-clip"}
    assert set(summary["exact"]) == {"grpo", name, "no-clip"} and summary["incomplete"] == []
    assert name in (folder / "table.csv").read_text()
    assert definition_of(name).fingerprint in (folder / "report.html").read_text()

    assert main(command) == 0  # again, and nothing is made
    assert "6 runs, 0 to make" in capsys.readouterr().out

    monkeypatch.setattr(study, "run_stack", None)
    assert main([*command[:4], "grpo", *command[5:]]) == 0  # nothing is imported because a file names it
    said = capsys.readouterr().out
    assert f"plan.json names {name} too; an own objective is imported only if --objectives names it" in said

    written(SOURCE.replace("0.28", "0.29"))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{name} is not the objective that the results in out were made with" in error and error.count("\n") == 1
