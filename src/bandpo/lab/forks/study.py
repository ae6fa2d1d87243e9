"""`bandpo lab forks`: runs the parts of a study, and writes forks.json and the figures."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import bandpo
from bandpo._system.about import about
from bandpo._system.files import finite_or_null, write_json, write_text
from bandpo._system.locks import claim_output, released
from bandpo._system.progress import Progress
from bandpo.lab.forks.figures import draw
from bandpo.lab.forks.plan import PRESETS, Preset, Store, run_drift, run_map, run_regimes
from bandpo.lab.forks.summary import summarise_drift, summarise_map, summarise_regimes, summarise_theory

PARTS = ("drift", "regimes", "map")
"""The parts of a study, in the order in which they are run."""


def lab_forks(options: argparse.Namespace) -> dict[str, Any]:
    """Run the study. The output folder gets forks.json, an SVG file for each figure, and cells/ with a file for each run.

    Args:
        options: The options of `bandpo lab forks`.

    Returns:
        The content of forks.json.

    Raises:
        ValueError: If an option has a value that is not allowed.
    """
    if options.device != "cpu":
        raise ValueError(
            f"--device {options.device}: bandpo lab forks runs small tables in float64; choose --device cpu"
        )
    parts = PARTS if options.only is None else tuple(options.only.split(","))
    if unknown := [p for p in parts if p not in PARTS]:
        raise ValueError(f"--only {','.join(unknown)}: choose from {', '.join(PARTS)}")
    progress = Progress()
    torch.set_num_threads(1)
    folder: Path = options.output
    with released(claim_output(folder)):
        store = Store(folder / "cells", progress.say)
        started = time.process_time()
        found = study(PRESETS[options.preset], store, parts)
        seconds = round(time.process_time() - started, 1)
        content = {
            **about(),
            "bandpo": bandpo.__version__,
            "preset": options.preset,
            "runs": store.made + store.found,
            "cpu_seconds": seconds,
            **found,
        }
        write_json(folder / "forks.json", finite_or_null(content), indent=None)
        for name, picture in draw(found).items():
            write_text(folder / f"{name}.svg", picture)
            progress.say(f"figure: {folder / f'{name}.svg'}")
    progress.say(f"{store.made} runs made, {store.found} found from before; {folder / 'forks.json'}")
    return content


def study(preset: Preset, store: Store, parts: tuple[str, ...] = PARTS) -> dict[str, Any]:
    """The numbers of the theory, and the summaries of the parts of a study.

    Args:
        preset: What the study contains.
        store: The results of runs.
        parts: Names in `PARTS`.
    """
    found: dict[str, Any] = {"theory": summarise_theory()}
    if "drift" in parts:
        found["drift"] = summarise_drift(run_drift(preset, store))
    if "regimes" in parts:
        found["regimes"] = summarise_regimes(run_regimes(preset, store))
    if "map" in parts:
        found["map"] = summarise_map(run_map(preset, store))
    return found
