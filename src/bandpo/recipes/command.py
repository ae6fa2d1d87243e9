"""`bandpo recipes`: its options, and what it prints."""

import argparse
from itertools import groupby
from pathlib import Path

from bandpo import recipes
from bandpo._system.options import add_examples

FOLDER = Path("recipes")
"""Where `bandpo recipes copy` writes: the pages and the recipes themselves name their files from there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bandpo recipes`.

    Args:
        parser: Parser of the command.
    """
    parser.description = (
        "Lists, shows and copies the configurations and scripts of whole runs that ship with bandpo: the paper's setting for "
        "bandpo train and for verl, and accelerate's files for several processes. Without an action it lists them."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="the names of the recipes, with what each is (the default)")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument(
        "recipe", metavar="NAME", type=_file, choices=recipes.names(), help="name of a recipe, such as trl/paper.yaml"
    )
    copy = actions.add_parser("copy", help="copy recipes into a folder of yours; no file is overwritten")
    copy.add_argument(
        "recipe",
        metavar="NAME",
        nargs="?",
        type=_file_or_folder,
        choices=[*recipes.folders(), *recipes.names()],
        help="name of a recipe or of a folder of them, such as verl (default: all of them)",
    )
    copy.add_argument("--to", type=Path, metavar="DIR", default=FOLDER, help=f"the folder (default: {FOLDER})")
    add_examples(
        parser,
        "recipes",
        "recipes show trl/paper.yaml",
        "recipes copy                       # all, into ./recipes",
        "recipes copy verl --to my-runs     # into my-runs/verl",
    )


# The choices are what a shell completes; these refuse other names before argparse would print all of the choices.
def _file(name: str) -> str:
    try:
        recipes.text(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _file_or_folder(name: str) -> str:
    try:
        recipes.chosen(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name.rstrip("/")


def run(options: argparse.Namespace) -> None:
    """List, show or copy recipes.

    Args:
        options: The options of the command.

    Raises:
        ValueError: If a file is in the way of a copy.
    """
    if options.action == "show":
        print(recipes.text(options.recipe), end="")
    elif options.action == "copy":
        try:
            copied = recipes.copy(recipes.chosen(options.recipe), options.to)
        except FileExistsError as error:  # a mistake in the input, not of the machine
            raise ValueError(str(error)) from None
        print("\n".join(map(str, copied)))
    else:
        print(listing())


def listing() -> str:
    """All recipes, a line for each; the files of a folder of alternatives are one line."""
    lines: list[str] = []
    for folder, several in groupby(recipes.names(), key=lambda name: name.rpartition("/")[0]):
        group = list(several)
        if folder.count("/") > 1:  # verl/config/method and verl/config/model
            stems = ", ".join(Path(name).stem for name in group)
            lines.append(f"{folder + '/':<28}{stems}")
        else:
            lines += [f"{name:<28}{recipes.about(name)}".rstrip() for name in group]
    return "\n".join(
        [*lines, "", "bandpo recipes show NAME prints one; bandpo recipes copy [NAME] [--to DIR] copies into ./recipes"]
    )
