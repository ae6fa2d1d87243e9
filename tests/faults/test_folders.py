"""Folders of runs: each has one run at a time, a stranger's links are not followed, and bugs do not look like input."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bandpo import cli
from bandpo._system.files import SEAL, seal, write_text
from bandpo._system.locks import Claim, InUseError, claim_file, claim_output, released
from bandpo.cli import main
from bandpo.train.folder import choose_folder, released_at_end


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def a_run(**options):
    run = SimpleNamespace(method="grpo", task="countdown", dataset=None, pairs=None)
    args = SimpleNamespace(
        objective="bandpo-kl", seed=0, output_dir=options.get("output_dir"), resume_from_checkpoint=None
    )
    args.resume_from_checkpoint = options.get("resume_from_checkpoint")
    return run, args, options, lambda _: None


def test_runs_at_once_have_a_folder_each():
    folders, start, end = [], threading.Barrier(6), threading.Barrier(6)

    @released_at_end()
    def begin():
        start.wait()
        _, args, *_ = call = a_run()
        assert choose_folder(*call) is None
        folders.append(args.output_dir)
        end.wait()

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    name = "runs/bandpo-kl-countdown-seed0"
    assert sorted(folders) == [name, *(f"{name}-{i}" for i in range(2, 7))]
    assert [*Path("runs").glob("*/*")] == []


def test_a_folder_that_is_named_and_in_use_is_refused(tmp_path):
    with released(Claim(tmp_path / "run")):
        for resume in (None, "latest"):
            options = {"output_dir": "run", **({"resume_from_checkpoint": resume} if resume else {})}
            with pytest.raises(InUseError, match=rf"run is in use by process {os.getpid()}; wait until it has ended"):
                choose_folder(*a_run(**options))
    with released(Claim(tmp_path / "runs" / "bandpo-kl-countdown-seed0")), pytest.raises(InUseError):
        choose_folder(*a_run(resume_from_checkpoint="latest"))  # the usual folder of a run that goes on


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--output_dir", "used"],
        ["train", "--method", "online-dpo", "--output_dir", "used"],
        ["compare", "--preset", "smoke", "--output", "used"],
        ["lab", "preference", "--only", "regret", "--output", "used"],
        ["lab", "selection", "--output", "used"],
    ],
)
def test_every_command_refuses_a_folder_in_use_before_it_does_anything(command, tmp_path, capsys):
    began = time.monotonic()
    with released(Claim(tmp_path / "used")):
        assert main(command) == 2
        assert re.search(r"bandpo: used is in use by process \d+; wait", capsys.readouterr().err)
        assert [p.name for p in (tmp_path / "used").iterdir()] == [".bandpo.lock"]
    assert time.monotonic() - began < 60


def test_a_file_of_results_has_one_writer(tmp_path, capsys):
    with released(claim_file(tmp_path / "scores.json")):
        assert main(["evaluate", "nowhere", "--task", "countdown", "--output", "scores.json"]) == 2
        assert re.search(r"bandpo: scores\.json is in use by process \d+; wait", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_runs_at_once_without_a_folder(tmp_path):
    options = ["--max_steps", "2", "--per_device_train_batch_size", "16", "--num_generations", "4", "--warm_up_steps", "20",
               "--eval_prompts", "4", "--eval_samples", "2", "--logging_steps", "1"]  # fmt: skip
    command = [sys.executable, "-m", "bandpo", "train", *options]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for run in runs:
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
    found = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert found == ["bandpo-kl-countdown-seed0", "bandpo-kl-countdown-seed0-2"]
    for name in found:
        assert (tmp_path / "runs" / name / "metrics.jsonl").read_text().count('"step"') == 2
        assert not (tmp_path / "runs" / name / ".bandpo.lock").exists()


@pytest.mark.parametrize("link", ["metrics.jsonl", "figures", "checkpoint-1/trainer_state.json", "deep/er/x"])
def test_a_link_that_leads_out_of_a_folder_is_refused(link, tmp_path, capsys):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("mine")
    path = tmp_path / "run" / link
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "target" / "precious")
    assert main(["train", "--output_dir", "run", "--resume_from_checkpoint", "latest"]) == 2
    assert (
        f"run/{link} is a link that leads out of the folder, to {tmp_path}/target/precious" in capsys.readouterr().err
    )
    assert (tmp_path / "target" / "precious").read_text() == "mine"


def test_links_inside_and_a_folder_that_is_a_link_are_fine(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    (tmp_path / "scratch" / "checkpoint-3").mkdir()
    (tmp_path / "scratch" / "last").symlink_to("checkpoint-3")
    claim_output(tmp_path / "run").release()


def raising(error):
    def run(_):
        raise error

    return run


def by_mistake(kind):
    """Errors of expressions: no `raise` wrote their message for a user."""
    namespace = {}
    code = {"type": "def run(_): return None + 1", "value": "def run(_): return int('x')", "key": "def run(_): return {}['x']",
            "assert": "def run(_): assert 1 == 2", "attribute": "def run(_): return None.x"}  # fmt: skip
    exec(compile(code[kind], cli.__file__, "exec"), namespace)  # as if it stood in our code
    return namespace["run"]


@pytest.mark.parametrize("kind", ["type", "value", "key", "assert", "attribute"])
def test_a_bug_of_ours_says_so_with_its_traceback(kind, capsys, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "planted-in-an-error")
    assert cli._guarded(by_mistake(kind), None) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "This is a bug in bandpo" in error


def test_input_has_one_line_and_its_traceback_on_request(capsys, monkeypatch):
    def refuse(_):
        from bandpo import Clip

        Clip(-1.0)

    assert cli._guarded(refuse, None) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "BANDPO_DEBUG" not in error
    monkeypatch.setenv("BANDPO_DEBUG", "1")
    assert cli._guarded(refuse, None) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.delenv("BANDPO_DEBUG")
    assert cli._guarded(raising(ValueError("of a library")), None) == 2
    assert capsys.readouterr().err == "bandpo: of a library (BANDPO_DEBUG=1 shows which library says so)\n"


def test_a_refused_pickle_is_one_line(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch pwned",))

    torch.save(Evil(), tmp_path / "optimizer.pt")
    assert cli._guarded(lambda _: torch.load(tmp_path / "optimizer.pt", weights_only=True), None) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("bandpo: a file of the run is refused, since loading it could run code")
        and "Traceback" not in error
    )
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "null", "[" * 100_000, '{"/etc/hostname": [1, 2]}', '{"../x": [0, 0]}', '{"x\\u0000": [0, 0]}'],
)
def test_a_seal_that_says_nothing_is_no_seal(content, tmp_path):
    from bandpo._system.files import damage

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_text("x")
    seal(tmp_path / "a")
    assert damage(tmp_path / "a") is None
    write_text(tmp_path / "a" / SEAL, content)
    assert damage(tmp_path / "a") is not None


def test_the_revision_of_a_stranger_s_folder_runs_nothing(tmp_path):
    """git runs a program that a repository's configuration names as its monitor of files."""
    from bandpo._system.about import git_revision

    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *command], check=True, cwd=tmp_path)
    subprocess.run(["git", "config", "core.fsmonitor", f"touch {tmp_path}/pwned; false"], check=True, cwd=tmp_path)
    assert git_revision()
    assert not (tmp_path / "pwned").exists()
