"""Options of `bandpo lab`."""

import argparse
from pathlib import Path

from bandpo._system.options import add_examples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the topics of `bandpo lab` and their options.

    Args:
        parser: Parser of the command.
    """
    parser.description = "Runs the experiments of one topic, and writes figures and JSON."
    topics = parser.add_subparsers(dest="topic", required=True, metavar="TOPIC")
    _add_preference(
        topics.add_parser("preference", help="preference learning: links, coverage, distillation, designs, re-ranking")
    )
    _add_forks(
        topics.add_parser("forks", help="the two halves of the band on a policy with a language model's token profile")
    )
    _add_evidence(topics.add_parser("evidence", help="the registered protocol: which claims about trust regions hold"))
    _add_selection(topics.add_parser("selection", help="pruning and packing on the main job: reward, tokens, seconds"))
    add_examples(parser, "lab preference --only links,coverage", "lab selection --steps 20")


def run(options: argparse.Namespace) -> int:
    """Run a topic of `bandpo lab`.

    Args:
        options: The options of the command.

    Returns:
        Exit status: 1 if a run failed, else 0.
    """
    if options.topic == "evidence":
        from bandpo.lab.evidence.command import lab_evidence  # it needs no matplotlib

        lab_evidence(options)
        return 0
    if options.topic == "forks":
        from bandpo.lab.forks.study import lab_forks  # it needs no matplotlib

        lab_forks(options)
        return 0
    from bandpo.lab.experiments.command import lab_preference, lab_selection

    if options.topic == "preference":
        lab_preference(options)
        return 0
    return int(bool(lab_selection(options)["failures"]))


def _add_preference(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--only",
        help="names separated by commas: links, regret, concentrability, coverage, distillation, calibration, design, "
        "reranking (default: all, some minutes)",
    )
    add("--seeds", type=int, default=5, help="seeds of the experiment on a transformer (default: 5)")
    _add_output(parser, "runs/lab-preference")


def _add_forks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--preset",
        choices=("smoke", "quick", "full"),
        default="quick",
        help="smoke (about a quarter of a minute of a core), quick (some minutes), full (hours of a core: all arms, SGD, the "
        "map, the confirmation; default: quick)",
    )
    add("--only", help="parts separated by commas: drift, regimes, widths, map, confirmation (default: all)")
    add("--regimes", help="regimes of the parts regimes and widths, separated by commas (default: those of the preset)")
    add("--arms", help="arms of the part regimes, separated by commas, grpo among them (default: those of the preset)")
    add("--optimizers", help="optimisers of the part regimes, separated by commas (default: those of the preset)")
    add("--jobs", type=int, default=2, help="runs at once; the results do not depend on it (default: 2)")
    _add_output(parser, "runs/lab-forks")


def _add_evidence(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--preset",
        choices=("smoke", "quick", "full"),
        default="quick",
        help="smoke (about half a minute of a core), quick (about eight minutes on two cores, warm-ups among them), "
        "full (hours: what is registered; default: quick)",
    )
    add(
        "--only",
        help="forks, transformers, or patterns of their places ('forks/*/adam'), separated by commas (default: all)",
    )
    add("--arms", help="arms beside grpo, separated by commas (default: all); a claim without its arms is not measured")
    add("--jobs", type=int, default=2, help="runs at once; the results do not depend on it (default: 2)")
    _add_output(parser, "runs/lab-evidence")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", help="arms separated by semicolons, named as in the report (default: all, half an hour)")
    add("--seeds", type=int, default=3, help="runs of each arm (default: 3)")
    add("--jobs", type=int, default=2, help="runs at once (default: 2)")
    add("--steps", type=int, help="optimiser steps of a run (default: the main job's)")
    _add_output(parser, "runs/lab-selection")


def _add_output(parser: argparse.ArgumentParser, folder: str) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, the only one that this topic has (default: cpu)")
    parser.add_argument(
        *("--output", "--output-dir"),
        type=Path,
        default=Path(folder),
        help=f"folder of the results (default: {folder})",
    )
