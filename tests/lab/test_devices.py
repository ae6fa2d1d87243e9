"""The lab on another device: nothing is made on the CPU, the numbers are the same, and what is not there is refused by name."""

import dataclasses
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bandpo import OBJECTIVES
from bandpo.cli import main
from bandpo.lab.comparison import command, exact, loop, study, warmup
from bandpo.lab.comparison.devices import device_kind, find_device
from bandpo.lab.comparison.exact import Tree, on_bandits, run_tree
from bandpo.lab.comparison.loop import Loop, Run, Setting
from bandpo.lab.comparison.plan import PRESETS, Arm, jobs_of
from bandpo.lab.comparison.problems import PROBLEMS, Problem, one_by_one
from bandpo.lab.comparison.stack import Stack
from bandpo.lab.comparison.sweeps import bandit
from bandpo.lab.comparison.top import has_inputs
from bandpo.lab.comparison.warmup import Checkpoint, warmed_up
from pretend_device import AWAY, Away, pretend_device

NAMES = [name for name, objective in OBJECTIVES.items() if has_inputs(objective)]
SIZE = {
    "updates": 2,
    "prompts": 4,
    "group": 4,
    "epochs": 1,
    "minibatches": 2,
    "hidden_size": 16,
    "layers": 1,
    "eval_samples": 2,
}


def tiny():
    """Say the prompt's first letter."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 9, (60, 2), generator=g)
    demonstrations = torch.cat([prompts, prompts[:, :1], torch.ones(60, 1, dtype=torch.int64)], 1)
    return Problem(
        "tiny",
        "",
        prompts[:50],
        prompts[50:],
        demonstrations,
        3,
        one_by_one(lambda p, c: float(c[:1] == p[:1])),
        str,
        6,
    )


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """`cuda` is the pretended device, and `tiny` is a problem."""
    made = tiny()
    for module in (loop, warmup):
        monkeypatch.setattr(module, "PROBLEMS", {**PROBLEMS, "tiny": lambda: made})
    for module in (loop, warmup, exact):
        monkeypatch.setattr(
            module, "find_device", lambda name: torch.device(AWAY if name.startswith("cuda") else "cpu")
        )
    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path))
    with sdpa_kernel(SDPBackend.MATH):  # the kernel that the pretended device takes
        yield


def numbers(x):
    return x.inner if isinstance(x, Away) else x


def weights(trained):
    return [numbers(w.detach()) for w in trained.stack.weights.values()]


def on_the_device(monkeypatch, setting, runs):
    with pretend_device(monkeypatch) as device:
        with device.here():  # models are built by transformers, on the CPU
            away = Loop(dataclasses.replace(setting, device="cuda"), runs)
        found = away.train()
    return away, found, device


def test_the_pretended_device_notices_what_cuda_would(monkeypatch):
    with pretend_device(monkeypatch) as device:
        x = torch.ones(3, device=AWAY)
        for wrong, words in (
            (lambda: torch.zeros(3), "made on the CPU"),
            (lambda: x + torch.arange(3), "made on the CPU"),
            (lambda: torch.rand(3, device=AWAY), "of no seed"),
            (lambda: torch.rand(3, device=AWAY, generator=torch.Generator()), "on another device"),
            (lambda: torch.rand(3, generator=torch.Generator(AWAY)), "on another device"),
        ):
            with pytest.raises(RuntimeError, match=words):
                wrong()
        with device.here():
            with pytest.raises(RuntimeError, match="two devices"):
                x + torch.ones(3)
            assert (x + torch.tensor(1.0)).tolist() == [2.0] * 3
            assert x[torch.tensor([True, False, True], device=AWAY)].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("lag", [0, 1])
def test_every_objective_trains_there_as_here(lag, monkeypatch):
    """Warm-up, rollouts, loss, update and evaluation of all of them, bit for bit."""
    setting = Setting("tiny", lag=lag, temperature=0.9, **SIZE)
    runs = [
        Run(OBJECTIVES[name], 3e-3, seed, warm_up=seed, kl_target=0.01 if name == "ppo-kl" else None)
        for name in (NAMES if lag else ["grpo", "bandpo-kl"])
        for seed in ((0,) if lag else (0, 1))
    ]
    here = Loop(setting, runs)
    wanted = here.train()
    away, found, device = on_the_device(monkeypatch, setting, runs)
    assert all(isinstance(w, Away) for w in away.stack.weights.values())
    assert all(torch.equal(a, b) for a, b in zip(weights(here), weights(away), strict=True))
    assert json.dumps([dataclasses.asdict(r) for r in found]) == json.dumps([dataclasses.asdict(r) for r in wanted])
    assert len(device.generators) >= len(runs) and device.operations["bmm"] > 100


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_problem_is_there_as_here(problem, monkeypatch):
    setting = Setting(problem, **{**SIZE, "updates": 1}, warm_up_steps=2)
    runs = [Run(OBJECTIVES["bandpo-kl"], 1e-3)]
    here = Loop(setting, runs)
    wanted = here.train()
    away, found, _ = on_the_device(monkeypatch, setting, runs)
    assert {x.device.type for x in (away.problem.prompts, away.problem.held_out, away.problem.demonstrations)} == {AWAY}
    assert all(torch.equal(a, b) for a, b in zip(weights(here), weights(away), strict=True))
    assert found[0].samples == wanted[0].samples


def test_a_checkpoint_is_made_there_and_kept_apart(monkeypatch):
    here, away = (Checkpoint("tiny", 3, 16, 1, device=device) for device in ("cpu", "cuda"))
    assert here.path != away.path
    assert away.path == Checkpoint("tiny", 3, 16, 1, device="cuda:1").path  # two cards are one kind of device
    first = warmed_up([here])
    with pretend_device(monkeypatch) as device:
        with device.here():
            stack = Stack.load([warmup._fresh(away)], torch.device(AWAY))
        warmup._learn(stack, [away], warmup.PROBLEMS["tiny"]().to(torch.device(AWAY)))
        with device.here():
            made = warmed_up([away])
    for name, w in first.weights.items():
        assert torch.equal(w, stack.weights[name].inner) and torch.equal(w, made.weights[name].inner)
    saved = torch.load(away.path / "weights.pt", weights_only=True)
    assert {w.device.type for w in saved.values()} == {"cpu"}  # another machine can read it


def test_names_of_results_and_checkpoints_of_the_cpu_are_those_of_before():
    """Written down when the format was last raised: a comparison of that time is continued, and its checkpoints are used."""
    plan = PRESETS["smoke"]
    [job] = jobs_of(plan, "paths", [Arm("grpo")], [0])
    assert job.key == "7a1146fcc3955e0a8cdc"
    assert Checkpoint("paths", 1, 32).path.name == "paths-f11cfe145106a786"
    keys = {}
    for device, sampler in (("cpu", "eager"), ("cuda", "eager"), ("cuda:0", "eager"), ("cuda:1", "graph")):
        other = dataclasses.replace(plan, device=device, sampler=sampler)
        keys[device, sampler] = jobs_of(other, "paths", [Arm("grpo")], [0])[0].key
    assert keys["cpu", "eager"] == job.key
    assert keys["cuda", "eager"] == keys["cuda:0", "eager"]
    assert len(set(keys.values())) == 3


def test_a_state_is_resumed_on_its_kind_of_device(monkeypatch):
    setting, runs = Setting("tiny", lag=1, **SIZE), [Run(OBJECTIVES["ppo-kl"], 3e-3, kl_target=0.01)]
    whole, _, _ = on_the_device(monkeypatch, setting, runs)
    with pretend_device(monkeypatch, strict=False):
        half, resumed = (Loop(dataclasses.replace(setting, device="cuda"), runs) for _ in range(2))
        half._evaluate("before")
        half.update()
        state = half.state_dict()
        resumed.load_state_dict(state)
        resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    with pytest.raises(ValueError, match=f"saved on {AWAY}.*resume on {AWAY}, or start anew"):
        Loop(setting, runs).load_state_dict(state)
    old = Loop(setting, runs).state_dict()
    del old["device"]  # as a version without a choice saved it
    Loop(setting, runs).load_state_dict(old)


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if on_bandits(objective)])
def test_the_bandit_is_there_as_here(name, monkeypatch):
    torch.manual_seed(0)  # clip-cov draws from PyTorch's own generator
    options = {"batches": 2, "queries": 2, "minibatches": 1, "noise": 0.2, "lag": 1, "seeds": 3}
    here = run_tree(Tree(depth=2), OBJECTIVES[name], **options)
    torch.manual_seed(0)
    with pretend_device(monkeypatch) as device:
        away = run_tree(Tree(depth=2), OBJECTIVES[name], **options, device="cuda")
        with device.here():
            one = bandit(OBJECTIVES[name], 2, batches=1, epochs=1, minibatches=1, device="cuda")
    assert {x.device.type for x in away} == {AWAY} and {x.device.type for x in one} == {"cpu"}
    assert all(torch.equal(a, b.inner) for a, b in zip(here, away, strict=True))


@pytest.mark.parametrize("name", ["tpu", "mps", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "", "meta"])
def test_a_device_without_a_path_is_refused(name):
    for refuse in (device_kind, find_device, lambda d: Setting("tiny", device=d), planned):
        with pytest.raises(ValueError, match=r"the lab runs on cpu, cuda, or one card as cuda:0.*no path"):
            refuse(name)


def planned(device):
    return dataclasses.replace(PRESETS["smoke"], device=device)


def test_a_device_that_is_not_there_is_refused_by_the_command(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "out"
    typed = ["compare", "--preset", "smoke", "--output", str(folder)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*typed, "--device", "cuda"]) != 0
    assert "finds no CUDA card on this machine; choose --device cpu" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main([*typed, "--device", "cuda:1"]) != 0
    assert "device cuda:1: this machine has 1 CUDA card(s), numbered from cuda:0" in capsys.readouterr().err
    assert main([*typed, "--sampler", "graph"]) != 0
    assert "it needs --device cuda, not cpu; choose --sampler eager" in capsys.readouterr().err
    assert not folder.exists()
    assert find_device("cuda").type == "cuda" and find_device("cuda:0").index == 0


def test_a_sampler_is_refused_where_it_is_unknown():
    with pytest.raises(ValueError, match="sampler: got 'fast'; choose one of eager, graph"):
        Setting("tiny", sampler="fast")


def test_a_graph_is_asked_for_in_rollouts_and_evaluation(monkeypatch):
    asked = []
    real = Stack.sample

    def sample(self, *args, fixed, **kwargs):
        asked.append(fixed)
        return real(self, *args, fixed=fixed, **kwargs)

    monkeypatch.setattr(Stack, "sample", sample)
    runs = [Run(OBJECTIVES["grpo"], 3e-3)]
    for sampler, wanted in (("eager", False), ("graph", True)):
        asked.clear()
        with pretend_device(monkeypatch) as device:
            with device.here():
                made = Loop(Setting("tiny", device="cuda", sampler=sampler, **SIZE), runs)
            found = made.train()
        assert asked == [wanted] * 4 and found[0].after["entropy"] > 0


def test_the_topics_of_the_lab_have_a_cpu_only_and_say_so(capsys, tmp_path):
    for topic, words in (("preference", "small tables in float64"), ("selection", "the main job")):
        assert main(["lab", topic, "--device", "cuda", "--output", str(tmp_path / "out")]) != 0
        assert words in (said := capsys.readouterr().err) and "`bandpo compare` for a GPU" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("device", "share"), [("cpu", None), ("cuda", 0.25), ("cuda:1", 0.25)])
def test_ray_is_asked_for_gpus_where_the_runs_need_one(device, share, monkeypatch, tmp_path):
    asked = []

    def cluster(stacks, make, workers, say, **options):
        asked.append(options)
        return iter(())

    monkeypatch.setattr(study, "ray_cluster", cluster)
    monkeypatch.setattr(study, "BACKENDS", {"ray": cluster})
    plan = dataclasses.replace(PRESETS["smoke"], device=device)
    made = study.Study(tmp_path, 4, lambda _: None, "ray")
    made.run(jobs_of(plan, "paths", [Arm("grpo")], [0]), "one")
    assert asked == [{} if share is None else {"gpus": share}]


def test_a_report_names_the_card(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    plan = dataclasses.replace(PRESETS["smoke"], device="cuda:1")
    found = command._about(study.Study(tmp_path, say=lambda _: None), plan, [])
    assert found["device"] == "Card 1" and found["plan"]["device"] == "cuda:1"
    assert command._about(study.Study(tmp_path, say=lambda _: None), PRESETS["smoke"], [])["device"] == "CPU"


def test_sweeps_of_another_kind_of_device_are_kept_apart(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        command, "sweep", lambda names, seeds, workers, device: asked.append(device) or {"seeds": seeds}
    )
    for device in ("cpu", "cuda", "cuda:1", "cpu"):
        plan = dataclasses.replace(PRESETS["paper"], device=device)
        command._sweeps(["grpo"], plan, tmp_path, 1, print)
    assert asked == ["cpu", "cuda"]
