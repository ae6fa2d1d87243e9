"""The commands `bandpo lab preference` and `bandpo lab selection`: experiments that leave a figure and a JSON file each."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt

import bandpo
from bandpo._system.about import about
from bandpo._system.files import write_json
from bandpo._system.locks import claim_output, released
from bandpo._system.progress import Progress, quiet_hosts
from bandpo.lab.experiments.preference import EXPERIMENTS
from bandpo.lab.experiments.preference_figures import FIGURES
from bandpo.lab.experiments.selection import ARMS, selection_on_the_main_job
from bandpo.lab.experiments.selection_figures import plot_selection


def lab_selection(options: argparse.Namespace) -> dict[str, Any]:
    """Train the main job with pruning and packing. The output folder gets selection.json, selection.png and the runs.

    Args:
        options: The options of `bandpo lab selection`.

    Returns:
        The content of selection.json; `failures` names the runs without a result.

    Raises:
        ValueError: If an option has a value that is not allowed.
    """
    _check_device(
        options.device, "selection trains the main job, which is one for the CPU; `bandpo train` has GPU recipes"
    )
    arms = list(ARMS) if options.only is None else [name.strip() for name in options.only.split(";")]
    unknown = [a for a in arms if a not in ARMS]
    if unknown:
        raise ValueError(f"--only {';'.join(unknown)}: choose from {'; '.join(ARMS)}")
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    folder: Path = options.output
    progress = Progress()
    steps = ["--max_steps", str(options.steps)] if options.steps else []
    with released(claim_output(folder)):
        found = selection_on_the_main_job(
            folder, seeds=options.seeds, jobs=options.jobs, arms=arms, options=steps, say=progress.say
        )
        found: dict[str, Any] = {**about(), "bandpo": bandpo.__version__, **found}
        write_json(folder / "selection.json", found, indent=None)
        arms_of: dict[str, list[Any]] = found["arms"]
        made = {arm: rows for arm, rows in arms_of.items() if rows}
        if made:
            figure = plot_selection({**found, "arms": made})
            figure.savefig(folder / "selection.png", dpi=120)
            plt.close(figure)
            progress.say(f"figure: {folder / 'selection.png'}")
    for line in found["failures"]:
        progress.say(f"missing: {line.splitlines()[0]}")
    return found


def lab_preference(options: argparse.Namespace) -> dict[str, Any]:
    """Run the preference experiments. The output folder gets NAME.json and NAME.png of each.

    Args:
        options: The options of `bandpo lab preference`.

    Returns:
        The content of each NAME.json, by name.

    Raises:
        ValueError: If an option has a value that is not allowed.
    """
    _check_device(
        options.device, "preference solves small tables in float64 and trains tiny models, for which a CPU is enough"
    )
    names = [*EXPERIMENTS, "reranking"] if options.only is None else options.only.split(",")
    unknown = [n for n in names if n not in FIGURES]
    if unknown:
        raise ValueError(f"--only {','.join(unknown)}: choose from {', '.join(FIGURES)}")
    if options.seeds < 2:
        raise ValueError(f"--seeds must be at least 2, for an interval; got {options.seeds}")
    progress = Progress()
    quiet_hosts()
    torch.set_num_threads(1)
    folder: Path = options.output
    with released(claim_output(folder)):
        return {name: _experiment(name, folder, options.seeds, progress) for name in names}


def _check_device(device: str, why: str) -> None:
    if device != "cpu":
        raise ValueError(f"--device {device}: bandpo lab {why}; choose --device cpu, or `bandpo compare` for a GPU")


def _experiment(name: str, folder: Path, seeds: int, progress: Progress) -> dict[str, Any]:
    started = time.monotonic()
    if name == "reranking":
        from bandpo.lab.experiments.reranking import (
            rerank_against_online,
        )  # it imports TRL

        found = rerank_against_online(seeds=seeds)
    else:
        found = EXPERIMENTS[name]()
    seconds = round(time.monotonic() - started, 1)
    everything = {**about(), "bandpo": bandpo.__version__, "seconds": seconds, **found}
    write_json(folder / f"{name}.json", everything, indent=None)
    figure = FIGURES[name](found)
    figure.savefig(folder / f"{name}.png", dpi=120)
    plt.close(figure)
    progress.say(f"{name:<16} {seconds:>6.1f} s   {folder / f'{name}.png'}")
    return everything
