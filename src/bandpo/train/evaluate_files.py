"""What `bandpo evaluate` writes: a result beside its run, the file of `--output`, and the figure or page of `--plot`."""

import argparse
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib import pyplot as plt

from bandpo._system.about import about, command_line, plain
from bandpo._system.files import write_json, write_text
from bandpo._system.pages import save_svg, template
from bandpo._system.progress import Progress
from bandpo._system.secrets import redact_text
from bandpo.plots.evaluations import plot_evaluations
from bandpo.train.evaluate_results import Result, file_name
from bandpo.train.evaluate_tables import labels, notes, rows_of, scored_on


def write_beside(result: Result, run: Path, options: argparse.Namespace, progress: Progress) -> None:
    """Write a result into the folder of its run and print where, or print why that cannot be: nothing is lost then.

    A result of the same evaluation is replaced. The folder may be read-only, or a stranger's with a link in it.

    Args:
        result: The result.
        run: Folder of the run that its model belongs to.
        options: The options of `bandpo evaluate`.
        progress: Prints the line.
    """
    folder = run / "evaluations"
    path = folder / file_name(result)
    try:
        wrong = f"{folder} is a link" if folder.is_symlink() else None
        if wrong is None:
            folder.mkdir(exist_ok=True)
            write_json(path, {**result.content(), "about": _about(options)})
    except OSError as error:
        wrong = error.strerror or str(error)
    if wrong is None:
        progress.say(f"result: {path}")
    else:
        more = "" if options.output else "; name a file with --output to keep it"
        progress.say(f"the result is not written beside the run ({wrong}){more}")


def write_results(results: Mapping[str, Result], options: argparse.Namespace, progress: Progress) -> None:
    """Write the file of `--output` and the figure of `--plot`.

    Args:
        results: The results by the names of their models; differences are to the first.
        options: The options of `bandpo evaluate`.
        progress: Prints where.
    """
    found = list(results.values())
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = found[0].content()
        if len(found) > 1:
            minus_first = [
                {"model": r.settings["model"], "minus": found[0].settings["model"], "measures": _as_json(r, found[0])}
                for r in found[1:]
            ]
            content = {"models": [r.content() for r in found], "differences": minus_first}
        write_json(options.output, {**content, "about": _about(options)})
    if options.plot is not None:
        _write_figure(results, options.plot)
        progress.say(f"figure: {options.plot}")


def _as_json(result: Result, first: Result) -> dict[str, dict[str, float]]:
    return {name: change._asdict() for name, change in result.differences_to(first).items()}


def _about(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: value for name, value in vars(options).items() if name != "command"}
    return about(seed=options.seed, options=plain(given))


def _write_figure(results: Mapping[str, Result], path: Path) -> None:
    """Draw the results; a page has their table as well."""
    named = labels(results)
    figure = plot_evaluations({named[name]: result.measures for name, result in results.items()})
    if path.suffix == ".svg":
        save_svg(figure, path)
    elif path.suffix == ".html":
        with TemporaryDirectory() as aside:
            svg = save_svg(figure, Path(aside) / "figure.svg")
        found = list(results.values())
        page = template("bandpo.train", "evaluate.html.j2").render(
            title=f"Evaluation of {len(found)} models"
            if len(found) > 1
            else f"Evaluation of {named[next(iter(results))]}",
            how=scored_on(found[0], several=len(found) > 1),
            rows=rows_of(results),
            figure=svg,
            notes=notes(found),
            models={named[name]: redact_text(str(result.settings["model"])) for name, result in results.items()},
            command=command_line(),
            version=version("bandpo"),
        )
        write_text(path, page)
    else:
        figure.savefig(path, dpi=200)
        plt.close(figure)
