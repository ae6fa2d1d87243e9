"""`bandpo bounds` and `bandpo objectives`; matplotlib is imported for figures only."""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from bandpo._system.errors import advise
from bandpo._system.imports import imported
from bandpo.bounds import Band, Clip, RatioBounds
from bandpo.bounds.band import as_divergence
from bandpo.bounds.calibration import match_radius
from bandpo.divergences import FDivergence, alpha
from bandpo.objective import Objective
from bandpo.zoo import OBJECTIVES, get_objective

_PROBABILITIES = [1e-4, 1e-3, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999]
_FIGURES = (".png", ".svg", ".pdf")


def show_bounds(options: argparse.Namespace) -> None:
    """Print the interval of one trust region or of several, and draw it.

    Args:
        options: The options of `bandpo bounds`.

    Raises:
        ValueError: If the options contradict each other, or the figure cannot be written in that format.
    """
    divergences = [_divergence(name.strip()) for name in options.divergence.split(",")]
    if options.match is not None and len(divergences) == 1:
        raise ValueError(f"--match {options.match} needs several divergences, for example --divergence kl,tv,chi2")
    if options.match == "outside_fraction":  # a function's argument, which this command has no batch for
        raise ValueError("--match outside_fraction needs the tokens of a batch: call bandpo.match_radius with batch=")
    if options.match not in (None, "max_shift") and not options.match.startswith(("upper@", "lower@")):
        raise ValueError(f"--match {options.match}: choose 'upper@P', 'lower@P' (P a probability) or 'max_shift'")
    if not options.no_figure:
        _check_figure("--output", options.output)
    bands = _bands(divergences, options.radius, options.match, options.max_ratio)
    if len(bands) == 1:
        _print_band(*next(iter(bands.items())), options.max_ratio)
    else:
        _print_families(bands)
    if not options.no_figure:
        try:
            _draw_bands(bands, options.match, options.output)
        except ImportError as error:
            advise(error, "--no-figure prints the table only")
            raise


def show_objectives(options: argparse.Namespace) -> None:
    """Print objectives, and draw their gradient weights if a path is given.

    Args:
        options: The options of `bandpo objectives`.

    Raises:
        ValueError: If a name is unknown, nothing has the text of the filter, or the figure cannot be written in that format.
    """
    path: Path | None = options.plot
    if path is not None and path.suffix:
        _check_figure("--plot", path)
    chosen = _chosen(options.names, options.filter)
    if options.json:
        print(json.dumps([_facts(name, objective) for name, objective in chosen.items()], indent=1, ensure_ascii=False))
    elif options.names:
        print("\n\n".join(_described(name, objective) for name, objective in chosen.items()))
    else:
        _print_table(chosen)
    if path is not None:
        drawn = _draw_weights(chosen, path)
        print(drawn, file=sys.stderr if options.json else sys.stdout)


def _chosen(names: list[str], text: str | None) -> dict[str, Objective]:
    """The objectives of these names, all where there are none, that have the text somewhere."""
    found = {name: get_objective(name) for name in names} if names else dict(OBJECTIVES)
    if text is None:
        return found
    has = {
        name: objective
        for name, objective in found.items()
        if text.casefold() in f"{name} {objective.formula} {objective.paper}".casefold()
    }
    if not has:
        raise ValueError(f"--filter {text}: none of {len(found)} objectives has it in name, formula or paper")
    return has


def _facts(name: str, objective: Objective) -> dict[str, object]:
    return {
        "name": name,
        "formula": objective.formula,
        "paper": objective.paper,
        "aggregation": objective.aggregation,
        "advantage": objective.advantage,
        "ratio_level": objective.ratio_level,
        "anchor": objective.anchor,
        "kl_coef": objective.kl_coef,
        "extras": sorted(objective.extras),
    }


def _described(name: str, objective: Objective) -> str:
    lines = [name, f"    {objective.formula or 'no formula'}", f"    {objective.paper or 'no paper'}"]
    lines.append(f"    aggregation {objective.aggregation}, advantage {objective.advantage}")
    lines.append(f"    ratio per {objective.ratio_level}, against the {objective.anchor} policy")
    if objective.extras:
        lines.append(f"    needs {', '.join(sorted(objective.extras))}")
    return "\n".join(lines)


def _print_table(objectives: Mapping[str, Objective]) -> None:
    """A row for each objective; on a terminal, rows are cut at its width."""
    width = max(map(len, objectives))
    formula = max(len(objective.formula) for objective in objectives.values())
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for name, objective in objectives.items():
        row = f"{name:<{width}}  {objective.formula:<{formula}}  {objective.paper}".rstrip()
        print(row if len(row) <= limit else row[: limit - 1] + "…")


def _draw_weights(objectives: Mapping[str, Objective], path: Path) -> str:
    """Draw one figure of all named objectives, or a folder with one of each that was chosen, and tell what was drawn."""
    from bandpo.plots.zoo import plot_weight, plot_zoo

    if path.suffix and len(objectives) not in (1, len(OBJECTIVES)):
        raise ValueError(f"--plot {path}: one figure shows one objective or all; name a folder for {len(objectives)}")
    if path.suffix:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = plot_zoo() if len(objectives) > 1 else plot_weight(next(iter(objectives)))
        figure.savefig(path, dpi=150)
        return f"figure: {path}"
    path.mkdir(parents=True, exist_ok=True)
    for name in objectives:
        plot_weight(name).savefig(path / f"{name.replace(':', '.')}.png", dpi=110)
    return f"{len(objectives)} figures: {path}/"


def _bands(
    divergences: list[FDivergence], radius: float, match: str | None, max_ratio: float | None
) -> dict[str, Band]:
    """The bands by their labels; with a match the radii of the other divergences follow from the first one."""
    first = Band(divergences[0], radius, max_ratio=None)
    bands: dict[str, Band] = {}
    for divergence in divergences:
        own = radius
        if match is not None and divergence is not divergences[0]:
            try:
                own = match_radius(divergence, like=first, by=match)
            except ValueError as error:
                raise ValueError(f"--match {match}: {error}") from None
        bands[f"{divergence.name}, radius {own:.4g}"] = Band(divergence, own, max_ratio=max_ratio)
    return bands


def _draw_bands(bands: dict[str, Band], matched: str | None, path: Path) -> None:
    from bandpo.plots.figures import plot_bounds, plot_families

    path.parent.mkdir(parents=True, exist_ok=True)
    if len(bands) == 1:
        label, band = next(iter(bands.items()))
        figure = plot_bounds(band, f"band: {label}")
    else:
        figure = plot_families(bands, matched=matched)
    figure.savefig(path, dpi=150)
    print(f"\nfigure: {path}")


def _divergence(name: str) -> FDivergence:
    if ":" not in name:
        return as_divergence(name)
    if not name.startswith("alpha:"):
        return _own_divergence(name)
    try:
        return alpha(float(name.partition(":")[2]))
    except ValueError as error:
        raise ValueError(f"--divergence {name}: after 'alpha:' comes the order, a finite number ({error})") from None


def _own_divergence(name: str) -> FDivergence:
    try:
        found = imported(name)
    except (Exception, SystemExit) as error:  # the code of the module runs, and may raise anything, or exit
        raise ValueError(f"--divergence {name} could not be imported: {error!r}") from error
    if not isinstance(found, FDivergence):
        raise ValueError(f"--divergence {name}: must be an FDivergence, got {type(found).__name__}")
    return found


def _check_figure(option: str, path: Path) -> None:
    if path.suffix not in _FIGURES:
        raise ValueError(f"{option} {path}: the figure must end in .png, .svg or .pdf")


def _print_band(label: str, band: Band, max_ratio: float | None) -> None:
    p = torch.tensor(_PROBABILITIES, dtype=torch.float64)
    lower, upper = band(p.log())
    print(f"{label}{'' if max_ratio is None else f', cap {max_ratio:g}'}\n")
    print(f"{'p':>7}  {'lower':>10}  {'upper':>10}  {'1/p':>10}  {'p·upper':>8}   Clip-Higher")
    wide = Clip(0.2, 0.28)(p.log())
    for row in zip(p, lower, upper, 1 / p, p * upper, wide.lower, wide.upper, strict=True):
        v = [x.item() for x in row]
        cells = f"{v[0]:>7g}  {v[1]:>10.4g}  {v[2]:>10.4f}  {v[3]:>10.4f}  {v[4]:>8.4f}"
        print(f"{cells}   {v[5]:.2f} … {v[6]:.2f}")


def _print_families(bands: dict[str, Band]) -> None:
    p = torch.tensor(_PROBABILITIES, dtype=torch.float64)
    intervals: list[RatioBounds] = [band(p.log()) for band in bands.values()]
    width = max(22, *(len(label) for label in bands))
    print("  ".join([f"{'p':>7}", *(f"{label:>{width}}" for label in bands)]))
    for i, probability in enumerate(_PROBABILITIES):
        cells = [f"{lower[i].item():.4g} … {upper[i].item():.4f}" for lower, upper in intervals]
        print("  ".join([f"{probability:>7g}", *(f"{cell:>{width}}" for cell in cells)]))
