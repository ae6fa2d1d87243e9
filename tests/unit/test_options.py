"""The parser of the command line: spellings, nearest names, sections; and what is said where a package is missing."""

import argparse
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import bandpo as package
from bandpo._system.extras import how_to_install
from bandpo._system.options import Parser, add_examples, put_in_sections
from bandpo.cli import COMMANDS, _parser, main
from bandpo.train.names import missing_folder


def below(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from below(inner)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.arguments], ids=lambda c: c.name)
def test_every_option_of_every_command_has_both_spellings(command):
    count = 0
    for parser in below(_parser(command)):
        for action in parser._actions:
            for option in (o for o in action.option_strings if o.startswith("--")):
                for spelled in {option.replace("-", "_").replace("__", "--", 1), "--" + option[2:].replace("_", "-")}:
                    assert parser._respelled([spelled, f"{spelled}=a_b-c"]) == [option, f"{option}=a_b-c"]
                    count += spelled != option
    assert count or command.name not in ("evaluate", "bounds", "doctor", "check-reward")


def test_values_and_words_after_two_dashes_are_left_alone():
    parser = Parser("x")
    parser.add_argument("--a-b")
    parser.add_argument("--a_b_c")
    parser.add_argument("rest", nargs="*")
    found = parser.parse_args(["--a_b", "a_b", "--a-b-c=x-y_z", "--", "--a_b"])
    assert (found.a_b, found.a_b_c, found.rest) == ("a_b", "x-y_z", ["--a_b"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'"),
        ("xyzw", r"unknown command 'xyzw' \(all of them: train,"),
        ("bounds --raduis 1", "bandpo bounds: error: unknown option --raduis; did you mean '--radius'"),
        ("compare --outptu x", "unknown option --outptu; did you mean '--output'"),
        ("objectives --filtr=x", "--filtr; did you mean '--filter'"),
        ("compare --preset smok", "invalid choice: 'smok'; did you mean 'smoke'"),
        ("lab prefrence", "unknown topic 'prefrence'; did you mean 'preference'"),
        ("lab selection --steps 3 --ony x", "unknown option --ony; did you mean '--only'"),
        ("completion bahs", "did you mean 'bash'"),
        ("recipes copi", "unknown action 'copi'; did you mean 'copy'"),
        ("recipes copy trl --too x", "unknown option --too; did you mean '--to'"),
        ("evaluate x --sample 3", "unknown option --sample; did you mean '--samples'"),
        ("evaluate x --promt_column y", "--promt_column; did you mean '--prompt-column'"),
        ("doctor x --tokenn=hf_abcdefghijklmnopqrstuv", "unknown option --tokenn"),
    ],
)
def test_the_nearest_name_is_told(line, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(words, error), error
    assert "hf_" not in error


def test_sections_and_examples_of_a_help():
    parser = Parser("x", description="What it does.")
    for name in ("--first", "--second", "--third"):
        parser.add_argument(name, help="h")
    put_in_sections(parser, {"a title": ("third", "first", "unknown")})
    add_examples(parser, "x --first 1   # as it is")
    text = parser.format_help()
    assert text.index("--second SECOND ") < text.index("a title:") < text.index("--third THIRD ")
    assert text.index("--third THIRD ") < text.index("--first FIRST ")
    assert text.endswith("examples:\n  bandpo x --first 1   # as it is\n")
    assert parser.parse_args(["--third", "3"]).third == "3"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.arguments], ids=lambda c: c.name)
def test_many_options_are_in_sections_and_examples_are_real(command):
    parser = next(p for p in below(_parser(command)) if p.prog == f"bandpo {command.name}")
    plain = [a for a in parser._optionals._group_actions if a.dest != "help"]
    assert len(plain) <= 13
    lines = (parser.epilog or "").splitlines()
    assert lines[0] == "examples:"
    for line in lines[1:]:
        words = line.partition("  #")[0].split()
        assert words[:2] == ["bandpo", command.name]
        if ">" not in words:
            inner = [word.strip("\"'") for word in words[1:]]
            assert _parser(command).parse_args(inner).command == command.name


def test_every_command_is_in_one_section_of_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    listed = text[: text.index("\nexamples:")]
    for command in COMMANDS:
        assert len(re.findall(rf"^  bandpo {command.name} ", listed, re.MULTILINE)) == 1


# ---- a package is missing

CORE = "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from bandpo.cli import main\n"
LINES = """
for line in sys.argv[1:]:
    print("##", line, file=sys.stderr, flush=True)
    try:
        status = main(line.split())
    except SystemExit as end:
        status = end.code
    print("##", status or 0, file=sys.stderr, flush=True)
"""
SAID = {
    "doctor log.jsonl": (0, ""),
    "train --help": (0, ""),
    "train --model x --radiu 1": (2, "did you mean 'radius'"),
    "train": (2, r"bandpo train needs PyYAML, which is not installed: pip install 'bandpo\[lab\]'"),
    "train --config run.yaml": (2, r"bandpo train needs PyYAML, which is not installed: pip install 'bandpo\[lab\]'"),
    "doctor run.yaml": (2, r"YAML files need PyYAML: pip install 'bandpo\[trl\]'"),
    "doctor log.jsonl --html x.html": (2, r"pip install 'bandpo\[lab\]'"),
    "evaluate x --task countdown": (2, r"bandpo evaluate needs \S+, which is not installed: pip install 'bandpo\[lab\]'"),
    "check-reward --dataset log.jsonl --reward math": (2, r"bandpo check-reward needs \S+, .*'bandpo\[lab\]'"),
    "compare --preset smoke": (2, r"bandpo compare needs \S+, which is not installed: pip install 'bandpo\[lab\]'"),
    "lab preference": (2, r"bandpo lab needs \S+, which is not installed: pip install 'bandpo\[lab\]'"),
    "lab selection": (2, r"bandpo lab needs \S+, which is not installed: pip install 'bandpo\[lab\]'"),
    "bounds --no-figure": (0, ""),
    "bounds": (2, r"bandpo.plots needs matplotlib: pip install 'bandpo\[plot\]'"),
    "objectives --filter gspo": (0, ""),
    "completion bash": (0, ""),
    "recipes": (0, ""),
    "recipes copy trl": (0, ""),
    "env": (0, ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def core_install(tmp_path_factory):
    """A folder with links to torch and what torch requires, and nothing else: what `pip install bandpo` leaves."""
    folder = tmp_path_factory.mktemp("core")
    todo, seen = ["torch"], set()
    while todo:
        name = re.split(r"[ ;\[<>=!~(]", todo.pop())[0]
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        todo += [text for text in found.requires or [] if "extra ==" not in text]
        for top in {Path(str(file)).parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    assert not {"transformers", "yaml", "rich"} & {p.name for p in folder.iterdir()}
    return folder


def test_a_core_install_names_the_package_and_the_extra(core_install, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"reward": 0.1, "entropy": 2.0}\n' * 20)
    (tmp_path / "run.yaml").write_text("task: countdown\n")
    path = f"{Path(package.__file__).parents[1]}:{core_install}"
    command = [sys.executable, "-I", "-S", "-c", CORE + LINES, path, *SAID]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    parts = re.split(r"^## ", done.stderr, flags=re.MULTILINE)[1:]
    assert len(parts) == 2 * len(SAID), done.stderr
    for (line, (status, words)), said, ended in zip(SAID.items(), parts[::2], parts[1::2], strict=True):
        assert said.startswith(line)
        assert int(ended.split()[0]) == status, said
        assert re.search(words, said), said
        assert "Traceback" not in said


def test_other_missing_modules_are_told_as_they_are():
    own = ModuleNotFoundError("No module named 'mine'", name="mine")
    assert how_to_install(own, "bandpo train", "lab") is None
    broken = ImportError("cannot import name 'x' from 'transformers'", name="transformers")
    assert how_to_install(broken, "bandpo train", "lab") is None
    inner = ModuleNotFoundError("No module named 'trl.new'", name="trl.new")
    error = ImportError("bandpo.integrations.trl needs TRL: pip install 'bandpo[trl]'")
    error.__cause__ = inner
    assert how_to_install(error, "bandpo doctor") is None
    assert "pip install 'bandpo[lab]'" in how_to_install(error, "bandpo train", "lab")


# ---- names of models that are no folders


def test_a_model_that_is_no_folder_is_refused_with_the_nearest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-qwen", "runs/bandpo-kl-countdown-seed0"):
        Path(name).mkdir(parents=True)
    expected = {
        "./tiny-qwn": "model ./tiny-qwn: there is no such folder; did you mean ./tiny-qwen?",
        "runs/bandpo-kl-countdown": "model runs/bandpo-kl-countdown: there is no such folder; did you mean "
        "runs/bandpo-kl-countdown-seed0?",
        "runs/nope": "model runs/nope: there is no such folder",
        "ruins/nope/model": "model ruins/nope/model: there is no such folder, and no folder ruins/nope",
        str(
            tmp_path / "tiny-qwn"
        ): f"model {tmp_path}/tiny-qwn: there is no such folder; did you mean {tmp_path}/tiny-qwen?",
        "~/x": f"model ~/x: ~ is read by the shell alone; in a file or in quotes write {Path.home()}/x",
    }
    for name, message in expected.items():
        assert missing_folder(name) == message
        assert main(["evaluate", name]) == 2
        assert capsys.readouterr().err == f"bandpo: {message}\n"
    for name in ("Qwen/Qwen2.5-3B", "gpt2", "./tiny-qwen", "tiny-qwen", "runs"):
        assert missing_folder(name) is None
