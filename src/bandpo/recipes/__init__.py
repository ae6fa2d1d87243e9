"""Configurations and scripts of whole runs, for TRL and for verl: files that ship with the package, to be copied.

The files lie in one folder for each host, `trl/` and `verl/`. A recipe is named by its path in here, such as
`trl/paper.yaml`; a folder names all files in it.
"""

import stat
from pathlib import Path

from bandpo._system.options import did_you_mean

FOLDERS = ("trl", "verl")
"""The folders with recipes, one for each host."""
ROOT = Path(__file__).parent


def names() -> list[str]:
    """The names of all recipes, sorted: the paths of their files with `/` between folders.

    Examples:
        >>> "trl/paper.yaml" in names(), "verl/train.sh" in names()
        (True, True)
    """
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return sorted(path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts)


def folders() -> list[str]:
    """The names of all folders that have recipes, sorted.

    Examples:
        >>> folders()
        ['trl', 'verl', 'verl/config', 'verl/config/method', 'verl/config/model']
    """
    parents = {parent.as_posix() for name in names() for parent in Path(name).parents}
    return sorted(parents - {"."})


def chosen(name: str | None) -> list[str]:
    """The recipes that a name stands for.

    Args:
        name: Name of a recipe or of a folder; None for all recipes.

    Raises:
        ValueError: If there is no such recipe or folder.

    Examples:
        >>> chosen("trl/fsdp2.yaml")
        ['trl/fsdp2.yaml']
        >>> chosen("trl/fsdp3.yaml")
        Traceback (most recent call last):
            ...
        ValueError: there is no recipe 'trl/fsdp3.yaml'; did you mean 'trl/fsdp2.yaml'? `bandpo recipes` lists all of them
    """
    if name is None:
        return names()
    plain = name.rstrip("/")
    found = [known for known in names() if known == plain or known.startswith(f"{plain}/")]
    if not found:
        hint = did_you_mean(plain, [*names(), *folders()])
        raise ValueError(f"there is no recipe {name!r}{hint or ';'} `bandpo recipes` lists all of them")
    return found


def text(name: str) -> str:
    """The content of a recipe.

    Args:
        name: Name of the recipe.

    Raises:
        ValueError: If there is no such recipe, or the name is that of a folder.
    """
    found = chosen(name)
    if found != [name]:
        raise ValueError(f"{name!r} is a folder of recipes; choose one of them: {', '.join(found)}")
    return (ROOT / name).read_text(encoding="utf-8")


def about(name: str) -> str:
    """What a recipe is: its title, or the first sentence of its first comment; nothing where it has none.

    Args:
        name: Name of the recipe.

    Examples:
        >>> about("trl/deepspeed_zero3.yaml")
        'accelerate: DeepSpeed ZeRO-3 on one machine with 8 GPUs'
    """
    for line in text(name).splitlines():
        if line.startswith(("#!", "# @")):  # the program that runs it, or a mark of Hydra
            continue
        if not line.startswith(("# ", '"""')):
            return ""
        return line.strip('#" ').partition(". ")[0].rstrip(".:")
    return ""


def copy(recipes: list[str], folder: Path) -> list[Path]:
    """Copy recipes into a folder, each at its path in here; nothing is copied if one of the files exists already.

    Args:
        recipes: Names of recipes.
        folder: The folder, which is made if there is none.

    Returns:
        The files that were written. A script keeps its permission to be run.

    Raises:
        FileExistsError: If there is a file already at one of the places, or something that is no folder above one.
    """
    targets = {name: folder / name for name in recipes}
    for name, target in targets.items():
        if target.exists() or target.is_symlink():
            raise FileExistsError(
                f"{target} exists already, and nothing was copied; choose another folder with --to, or move that file"
            )
        above = next(parent for parent in target.parents if parent.exists())
        if not above.is_dir():
            raise FileExistsError(
                f"{above} is no folder, so {name} cannot be copied below it; choose another with --to"
            )
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:  # refuses what another process made meanwhile
            file.write((ROOT / name).read_bytes())
        if (ROOT / name).stat().st_mode & stat.S_IXUSR:
            target.chmod(target.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return list(targets.values())
