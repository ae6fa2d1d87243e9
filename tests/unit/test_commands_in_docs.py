"""The commands that the pages show: the command line accepts each, and the scripts of the repository that they name exist."""

import re
import shlex
from contextlib import redirect_stdout
from io import StringIO

import pytest

from bandpo import recipes
from bandpo.cli import COMMANDS, _parser
from bandpo.train.config import read
from bandpo.train.options import declared_in, packaged_table, parsed
from sources import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
STANDS_FOR = {"METHOD": "dpo", "NAME": "grpo", "RULE": "inert", "S": "0"}
"""What the pages write in place of a name that the reader chooses."""
ENDS = ("&&", "||", ">", "|", ";", ")")


def commands() -> list[tuple[str, list[str]]]:
    """The words after each `bandpo` of a page, in its shell blocks and in its text, with the name of the page."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
        shown = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        shown += [" ".join(x.split()) for x in re.findall(r"`(bandpo [^`]+)`", outside)]
        for line in (x for x in shown if re.search(r"(?<![\w.=])bandpo ", x)):
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split, lexer.commenters = True, "#"
            words = list(lexer)
            starts = [i for i, word in enumerate(words) if word == "bandpo" and words[i + 1 : i + 2] != ["="]]
            for start in starts:
                rest = words[start + 1 :]
                end = next((i for i, word in enumerate(rest) if word in ENDS), len(rest))
                call = [STANDS_FOR.get(word, word) for word in rest[:end] if word != "..."]
                if words[max(start - 1, 0)] not in ("install", "import"):
                    found.setdefault((page.name, tuple(call)), None)
    return [(name, list(call)) for name, call in found]


@pytest.mark.parametrize(("page", "call"), [pytest.param(*x, id=f"{x[0]}: {' '.join(x[1])}") for x in commands()])
def test_the_command_line_accepts_it(page, call, tmp_path, monkeypatch):
    """Names of commands and options, and the kinds of their values; nothing runs."""
    monkeypatch.chdir(tmp_path)
    recipes.copy(recipes.chosen("trl"), tmp_path / "recipes")  # as the pages tell the reader to do
    for name in ("run.yaml", "other.yaml", "RUN/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("objective: bandpo-kl\n")
    command = next((c for c in COMMANDS if call[:1] == [c.name]), None)
    assert command is not None or call[0].startswith("-") or call[0] == "COMMAND", call
    if command is None or len(call) == 1:  # of the program itself, or the name of a command in a sentence
        return
    if command.arguments is not None:
        assert _parser(command).parse_args(call).command == command.name
        return
    status: object = 0
    with redirect_stdout(StringIO()) as printed:
        try:
            request = read(call[1:], lambda method: declared_in(packaged_table(), method))
            request.set_defaults()
            assert parsed(request.declared, request.arguments) is not None
        except SystemExit as end:  # --help and --schema
            status = end.code or (0 if printed.getvalue() else "nothing was printed")
    assert status == 0


def test_commands_were_found():
    found = commands()
    assert len(found) > 60 and {call[0] for _, call in found if call} > {command.name for command in COMMANDS} - {"lab"}


def test_scripts_of_the_repository_have_the_options_that_pages_give_them():
    found = 0
    for page in PAGES:
        text = page.read_text()
        for script, options in re.findall(r"python3? ((?:tools|examples|benchmarks|tests)/[\w/.]+)([^`\n#]*)", text):
            path = ROOT / script
            source = (path / "__main__.py" if path.is_dir() else path).read_text()
            for option in re.findall(r"(?<!\S)--[\w-]+", options):
                assert f'"{option}"' in source, f"{page.name}: {script} has no {option}"
                found += 1
    assert found >= 5


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"`make ([a-z][\w-]*)", page.read_text()):
            assert target in targets, f"{page.name}: make {target}"
