"""The completion of the shells, run in bash, and in zsh and fish where they are installed."""

import shutil
import subprocess
import sys
import time

import pytest

from bandpo.cli import COMMANDS, main
from bandpo.train.options import packaged_table


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["completion", shell]) == 0
        (folder / shell).write_text(out.getvalue())
    return folder


def completed(folder, *words, cwd):
    """What bash offers for the last of the words after `bandpo`."""
    code = 'source "$1"; shift; COMP_WORDS=(bandpo "$@"); COMP_CWORD=$#; _bandpo; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "--norc", "-u", "-c", code, "bash", folder / "bash", *words],
        capture_output=True, text=True, check=True, cwd=cwd,
    )  # fmt: skip
    assert not done.stderr
    return [word for word in done.stdout.split("\n") if word]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["-"], ["--help", "--version"]),
        (["train", "--objectiv"], ["--objective"]),
        (["train", "--objective", "cis"], ["cispo"]),
        (["train", "--objective", "chi2-d"], ["chi2-dpo"]),
        (["train", "--task", "c"], ["countdown", "chain_sum"]),
        (["train", "--task", "="], ["countdown", "chain_sum", "sums", "letter_counting"]),
        (["train", "--task", "=", "su"], ["sums"]),
        (["train", "--method", "onl"], ["online-dpo"]),
        (["train", "--preset", ""], ["smollm2"]),
        (["train", "--bf16", ""], ["true", "false"]),
        (["train", "--config", ""], []),  # files, which bash completes itself
        (["train", "--rounds", ""], []),
        (["train", "--schem"], ["--schema"]),
        (["compare", "--objectives", "grpo,cis"], ["grpo,cispo"]),
        (["compare", "--preset", "s"], ["smoke"]),
        (["evaluate", "--prompt-c"], ["--prompt-column"]),
        (["lab", ""], ["preference", "forks", "evidence", "selection"]),
        (["recipes", "c"], ["copy"]),
        (["recipes", "show", "trl/pa"], ["trl/paper.yaml", "trl/paper_server.yaml"]),
        (["recipes", "copy", "--t"], ["--to"]),
        (["env", "-"], ["-h", "--help", "--json"]),
        (["objectives", "gsp"], ["gspo"]),
        (["objectives", "--plot", ""], []),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["nothing", ""], []),
    ],
)
def test_bash_completes(words, expected, scripts, tmp_path):
    assert completed(scripts, *words, cwd=tmp_path) == expected


def test_every_command_and_option_is_offered(scripts, tmp_path):
    assert completed(scripts, "", cwd=tmp_path) == [command.name for command in COMMANDS]
    table = packaged_table()
    names = {row["options"][0] for rows in (table["grpo"], table["preference"]) for row in rows}
    offered = completed(scripts, "train", "--", cwd=tmp_path)
    assert names | {"--config", "--preset", "--help", "--help-all", "--schema"} == set(offered)
    assert len(offered) == len(set(offered))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_can_be_read_by_their_shells(shell, scripts):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert subprocess.run([shell, "-n", scripts / shell], capture_output=True, check=False).returncode == 0


def test_fish_completes(scripts):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    code = f"source {scripts / 'fish'}; complete -C'bandpo compare --objectives grpo,cis'; complete -C'bandpo tra'"
    done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["grpo,cispo", "train"]


def test_a_script_needs_no_torch_and_little_time():
    code = (
        "import sys, time; began = time.process_time(); from bandpo.cli import main; main(['completion', 'bash'])\n"
        "assert 'torch' not in sys.modules and 'yaml' not in sys.modules\n"
        "print(time.process_time() - began, file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(float(done.stderr))
        if seconds[-1] < 0.15:
            return
        time.sleep(1)
    raise AssertionError(seconds)
