"""`bandpo recipes`: what it lists is what there is, copies are the same files, and nothing is overwritten."""

import os
import re
from pathlib import Path

import pytest

from bandpo import recipes
from bandpo.cli import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "src" / "bandpo" / "recipes"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def said(capsys, *words, status=0):
    try:
        found = main(["recipes", *words])
    except SystemExit as end:
        found = end.code
    out = capsys.readouterr()
    assert found == status, out.err
    return out.out if status == 0 else out.err


def below(folder):
    """Every file below a folder with its bytes, and whether it may be run."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), os.access(path, os.X_OK))
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def shipped():
    kept = {k: v for k, v in below(FOLDER).items() if "__pycache__" not in k}
    return {k: v for k, v in kept.items() if "/" in k}


def test_every_file_is_listed(capsys):
    assert recipes.names() == sorted(shipped()) and len(recipes.names()) > 20
    for words in ((), ("list",)):
        text = said(capsys, *words)
        for name in recipes.names():
            folder, _, file = name.rpartition("/")
            if folder.startswith("verl/config/"):
                line = re.search(rf"^{folder}/ +(.*)$", text, re.MULTILINE)[1]
                assert Path(file).stem in line.split(", ")
            else:
                assert re.search(rf"^{re.escape(name)} +\S", text, re.MULTILINE), (
                    f"{name} has no line that tells what it is"
                )


def test_a_recipe_is_shown_as_it_is(capsys):
    for name in recipes.names():
        assert said(capsys, "show", name) == (FOLDER / name).read_text()
    assert "did you mean 'trl/paper.yaml'" in said(capsys, "show", "trl/papr.yaml", status=2)
    for name in ("verl/config/method", "verl/config/method/"):
        refused = said(capsys, "show", name, status=2)
        assert f"'{name}' is a folder of recipes; choose one of them: verl/config/method/bandpo-chi2.yaml, " in refused
        assert "trl/" not in refused.replace("verl/", "")
    assert "unknown action 'sho'; did you mean 'show'" in said(capsys, "sho", status=2)
    with pytest.raises(
        ValueError, match=r"'verl/config/model' is a folder of recipes; choose one of them: verl/config/model"
    ):
        recipes.text("verl/config/model")


def test_all_are_copied_with_their_permissions(capsys):
    lines = said(capsys, "copy").splitlines()
    assert sorted(lines) == [f"recipes/{name}" for name in recipes.names()]
    assert below("recipes") == shipped()
    assert os.access("recipes/verl/train.sh", os.X_OK) and not os.access("recipes/trl/paper.yaml", os.X_OK)


@pytest.mark.parametrize("name", ["trl", "trl/", "verl/config", "verl/config/method", "trl/fsdp2.yaml"])
def test_a_part_is_copied_to_where_it_was_asked_for(name, capsys):
    said(capsys, "copy", name, "--to", "here/and/there")
    part = {k: v for k, v in shipped().items() if k == name or k.startswith(f"{name.rstrip('/')}/")}
    assert part and below("here/and/there") == part


def test_nothing_is_overwritten_and_nothing_is_half_copied(capsys):
    Path("recipes/verl").mkdir(parents=True)
    mine = Path("recipes/verl/train.sh")
    mine.write_text("mine")
    text = said(capsys, "copy", status=2)
    assert text == (
        "bandpo: recipes/verl/train.sh exists already, and nothing was copied; choose another folder with --to, or move that "
        "file\n"
    )
    assert below("recipes") == {"verl/train.sh": (b"mine", False)}
    said(capsys, "copy", "trl")  # another part is not in the way
    mine.unlink()
    mine.symlink_to("nowhere")  # a link that leads to nothing is in the way as well
    assert "recipes/verl/train.sh exists already" in said(capsys, "copy", "verl", status=2)
    Path("file").write_text("x")
    assert "file is no folder, so trl/" in said(capsys, "copy", "trl", "--to", "file", status=2)
    assert Path("file").read_text() == "x"
    assert "there is no recipe 'verll'; did you mean 'verl'?" in said(capsys, "copy", "verll", status=2)
    with pytest.raises(ValueError, match=r"there is no recipe 'x/y'; `bandpo recipes` lists all of them"):
        recipes.chosen("x/y")


def test_a_file_that_appears_meanwhile_is_kept(monkeypatch):
    """Two commands at once: the second must not write over the first."""
    real = Path.mkdir

    def mkdir(self, *args, **kwargs):
        real(self, *args, **kwargs)
        (self / "two_cpus.yaml").write_text("another's")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(FileExistsError):
        recipes.copy(["trl/two_cpus.yaml"], Path("x"))
    assert Path("x/trl/two_cpus.yaml").read_text() == "another's"


def test_every_path_that_recipes_and_pages_name_is_there_after_a_copy():
    recipes.copy(recipes.names(), Path("recipes"))
    texts = [*Path("recipes").rglob("*.*"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {
        m for path in texts if path.is_file() for m in re.findall(r"\brecipes/(?:trl|verl)[\w./-]*\w", path.read_text())
    }
    assert len(named) > 6
    for path in named:
        assert Path(path).exists(), path
