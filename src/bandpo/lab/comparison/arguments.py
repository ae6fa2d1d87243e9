"""Options of `bandpo compare`."""

import argparse
from pathlib import Path

from bandpo._system.options import add_examples

PRESET_NAMES, BACKEND_NAMES = ("smoke", "quick", "paper", "full"), ("processes", "ray")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bandpo compare`.

    Args:
        parser: Parser of the command.
    """
    parser.description = (
        "With folders of runs of bandpo train: compares these runs, in one report; only --output belongs to it. Without: "
        "tunes, runs and compares objectives on tiny models, over paired seeds. An interrupted or extended comparison "
        "continues where it ended: a run whose configuration has a result is not repeated."
    )
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="folders of two or more runs of bandpo train")
    add(
        "--preset",
        default="quick",
        choices=PRESET_NAMES,
        help="size: half a minute (smoke), some minutes (quick), half an hour or more (paper), an hour or more (full) "
        "(default: quick)",
    )
    add(
        "--objectives",
        help="names separated by commas, see `bandpo objectives`, or package.module:NAME of your own, which is imported "
        "(default: the preset's)",
    )
    add(
        "--tasks",
        help="paths, addition, detours, traps, countdown, chain_sum, sums, letter_counting (default: the preset's)",
    )
    add("--seeds", help="seeds of the report, 0-9 or 0,3,5 (default: the preset's)")
    add("--updates", type=int, help="rollouts of a run (default: the preset's)")
    add("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    add(
        "--backend",
        default="processes",
        choices=BACKEND_NAMES,
        help="where the runs are made: in local processes, or in Ray's cluster at RAY_ADDRESS or a local one "
        "(default: processes)",
    )
    add(
        "--device",
        default="cpu",
        help="cpu, cuda, or one card as cuda:0; the processes of --jobs share it. Another kind of device draws other random "
        "numbers (default: cpu)",
    )
    add(
        "--sampler",
        default="eager",
        choices=("eager", "graph"),
        help="how a new token is computed: operation by operation, or by a CUDA graph (default: eager)",
    )
    add(
        "--output",
        "--output-dir",
        type=Path,
        help="folder of the results (default: runs/compare-PRESET, or runs/compared)",
    )
    add_examples(
        parser,
        "compare --preset smoke                            # does it run? half a minute",
        "compare --objectives bandpo-kl,grpo,dapo --seeds 0-9",
    )


def run(options: argparse.Namespace) -> int:
    """Run `bandpo compare`.

    Args:
        options: The options of the command.

    Returns:
        Exit status: 1 if a run has no result or cannot be read, else 0.
    """
    if options.runs:
        _refuse_others(options)
        from bandpo.train.compare_runs import compare_runs

        return compare_runs(options)
    from bandpo.lab.comparison.command import compare

    return int(not compare(options).complete)


def _refuse_others(options: argparse.Namespace) -> None:
    """Refuse the options of a comparison of objectives beside folders of runs."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    usual = vars(parser.parse_args([]))
    named = [name for name, value in vars(options).items() if name in usual and value != usual[name]]
    if others := sorted(set(named) - {"runs", "output"}):
        raise ValueError(
            f"compare: --{others[0]} belongs to the comparison of objectives, and has no meaning for runs that exist "
            f"({', '.join(map(str, options.runs))}); objectives are named with --objectives"
        )
