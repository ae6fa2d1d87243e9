"""The command line. Heavy imports happen inside the commands: `bandpo --help` is instant."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import bandpo
from bandpo._system.errors import LINES, RunError, printable
from bandpo._system.secrets import redact_text, remember

_DESCRIPTION = """\
Trust regions for LLM reinforcement learning.

  bandpo train                 train a small language model with BandPO on the CPU, in about two minutes
  bandpo train --config FILE   the same on any Hugging Face causal LM and dataset
  bandpo evaluate MODEL        mean@k and pass@k of a saved model
  bandpo train --method NAME   preference learning: dpo, chipo, online-dpo, pdfr, rebel, rdrc, rbrm
  bandpo compare               objectives against each other, over seeds, with intervals
  bandpo lab preference        what links, samplers and labels do in preference learning, as figures
  bandpo lab selection         what pruning and packing save, and cost
  bandpo doctor FILE...        does the trust region act? a configuration, a log, a batch, a run's folder
  bandpo bounds                the interval of a trust region, as a table and a figure
  bandpo objectives            the named objectives: formula and paper
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. Mistakes in the input end with one line and status 2.

    BANDPO_DEBUG=1 in the environment shows the traceback of every error.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    remember(argv)
    parser = _parser()
    if argv[:1] == ["train"]:  # its options are those of TRL: parsed where TRL is imported
        return _guarded(_train, argv[1:])
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 0
    return _guarded(options.run, options)


class _Parser(argparse.ArgumentParser):
    """Its errors repeat what was typed."""

    def error(self, message: str) -> NoReturn:
        super().error(redact_text(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("bandpo", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"bandpo {bandpo.__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="")

    commands.add_parser("train", help="train a language model (bandpo train --help)", add_help=False)

    evaluate = commands.add_parser(
        "evaluate", help="mean@k and pass@k of a model on held-out prompts",
        description="MODEL of a run of bandpo (RUN, RUN/model, RUN/checkpoint-N) is sampled and scored as the run did it, on "
        "the prompts that the run held out; options that are given win. Another model needs --task, or --dataset and --reward.",
    )  # fmt: skip
    evaluate.add_argument("model", metavar="MODEL", help="folder of a run, or folder or Hub name of a causal LM")
    evaluate.add_argument("--task", help="built-in task (default: the run's)")
    evaluate.add_argument("--dataset", help="Hub name, or a .jsonl, .json, .parquet or .csv file (default: the run's)")
    evaluate.add_argument("--dataset-config", help="configuration of a Hub dataset")
    evaluate.add_argument("--dataset-split", help="split of a Hub dataset (default: test)")
    evaluate.add_argument("--prompt-column", help="default: the run's, or prompt")
    evaluate.add_argument("--answer-column", help="default: the run's, or answer")
    evaluate.add_argument("--system-prompt", help="put before text prompts (default: the run's)")
    evaluate.add_argument(
        "--reward", help="math, a task's name, or package.module:NAME, which is imported (default: the run's or task's)"
    )
    evaluate.add_argument("--prompts", type=int, help="at most so many prompts (default: the run's, or 256)")
    evaluate.add_argument(
        "--samples", type=int, help="samples of each prompt, the k of mean@k (default: the run's, or 8)"
    )
    evaluate.add_argument("--temperature", type=float, help="of sampling, 0 is greedy (default: the run's, or 1.0)")
    evaluate.add_argument("--top-p", type=float, help="of sampling (default: the run's, or 1.0)")
    evaluate.add_argument("--max-new-tokens", type=int, help="default: the run's, the task's, or 1024")
    evaluate.add_argument("--batch-size", type=int, help="completions at once (default: the run's, or 512)")
    evaluate.add_argument("--seed", type=int, default=1234, help="of sampling (default: 1234)")
    evaluate.add_argument(
        "--bad-rows", choices=("error", "skip"),
        help="rows that cannot be used or scored: error, or skip (counted) (default: the run's, or error)",
    )  # fmt: skip
    evaluate.add_argument("--trust-remote-code", action="store_true", help="run code that the model's folder brings")
    evaluate.add_argument("--output", type=Path, help="write the summary here, as JSON")
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser(
        "compare", help="objectives against each other on small models, with intervals",
        description="Tunes, runs and compares objectives on tiny models, over paired seeds. Interrupted or extended "
        "comparisons go on where they were: a run whose configuration has a result is not made again.",
    )  # fmt: skip
    compare.add_argument("--preset", default="quick", choices=("smoke", "quick", "paper", "full"),
                         help="size: half a minute, some minutes, an hour or more (default: quick)")  # fmt: skip
    compare.add_argument("--objectives", help="names by commas, see `bandpo objectives` (default: the preset's)")
    compare.add_argument(
        "--tasks", help="paths, addition, countdown, chain_sum, letter_counting (default: the preset's)"
    )
    compare.add_argument("--seeds", help="of the report, 0-9 or 0,3,5 (default: the preset's)")
    compare.add_argument("--updates", type=int, help="rollouts of a run (default: the preset's)")
    compare.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    compare.add_argument("--backend", default="processes", choices=("processes", "ray"),
                         help="of the runs; ray: RAY_ADDRESS's cluster or a local one (default: processes)")  # fmt: skip
    compare.add_argument("--output", type=Path, help="folder (default: runs/compare-PRESET)")
    compare.add_argument("--evidence", type=Path, metavar="DIR",
                         help="also write evidence.md, evidence.json and pictures there, as in docs/")  # fmt: skip
    compare.set_defaults(run=_compare)

    lab = commands.add_parser("lab", help="experiments that show one thing each, as a figure and JSON")
    topics = lab.add_subparsers(dest="topic", required=True, metavar="TOPIC")
    preference = topics.add_parser(
        "preference", help="preference learning: links, coverage, distillation, designs, re-ranking"
    )
    preference.add_argument("--only", help="names by commas: regret, concentrability, coverage, distillation, calibration, "
                            "design, reranking (default: all, some minutes)")  # fmt: skip
    preference.add_argument("--seeds", type=int, default=5, help="of the experiment on a transformer (default: 5)")
    preference.add_argument("--output", type=Path, default=Path("runs/lab-preference"),
                            help="folder (default: runs/lab-preference)")  # fmt: skip
    preference.set_defaults(run=_lab_preference)

    selection = topics.add_parser("selection", help="pruning and packing on the main job: reward, tokens, seconds")
    selection.add_argument("--only", help="arms by semicolons, as the report names them (default: all, half an hour)")
    selection.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: 3)")
    selection.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    selection.add_argument("--steps", type=int, help="optimiser steps of a run (default: the main job's)")
    selection.add_argument("--output", type=Path, default=Path("runs/lab-selection"),
                           help="folder (default: runs/lab-selection)")  # fmt: skip
    selection.set_defaults(run=_lab_selection)

    doctor = commands.add_parser(
        "doctor", help="does the trust region act, and does the run look well?",
        description="Examines a configuration (TRL's or bandpo's YAML; verl's YAML, or a file of overrides), a "
        "log (metrics.jsonl), "
        "a saved batch (.safetensors, .pt, .npz), or the folder of a run. Each line has what was seen, why, and what to set. "
        "Status 1 where there is a problem (!!), else 0.",
    )  # fmt: skip
    doctor.add_argument("paths", nargs="+", metavar="FILE", help="or key=value, an override of the configuration")
    doctor.add_argument("--target", type=float, default=0.01,
                        help="share of tokens to clip, for the radius that a batch gives (default: 0.01)")  # fmt: skip
    doctor.add_argument(
        "--processes", type=int, default=1, help="that will train, for generation_batch_size (default: 1)"
    )
    doctor.add_argument(
        "--vocabulary", type=int, help="of the model (default: that of its folder), for its logits' memory"
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)

    bounds = commands.add_parser("bounds", help="table and figure of a trust region's interval")
    bounds.add_argument(
        "--divergence",
        default="kl",
        help="kl, reverse_kl, tv, chi2, ... or alpha:VALUE; several by commas (default: kl)",
    )
    bounds.add_argument(
        "--radius", type=float, default=0.05, help="δ, in the units of the (first) divergence (default: 0.05)"
    )
    bounds.add_argument(
        "--match",
        help="with several divergences, give the others the radius that does the same as the first: upper@P or lower@P (the "
        "bound of a token of probability P) or max_shift (default: the same radius for all)",
    )
    bounds.add_argument(
        "--max-ratio", type=float, help="cap on the upper bound; the paper's runs use 10 (default: none)"
    )
    bounds.add_argument(
        "--output", type=Path, default=Path("bounds.png"), help="figure: .png, .svg or .pdf (default: bounds.png)"
    )
    bounds.add_argument("--no-figure", action="store_true", help="table only")
    bounds.set_defaults(run=_bounds)

    objectives = commands.add_parser("objectives", help="the named objectives: formula and paper")
    objectives.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        help="also draw the gradient weight of each over p and r: one figure (.png, .svg, .pdf), or a folder of them",
    )
    objectives.set_defaults(run=_objectives)
    return parser


def _guarded(run: Callable[[Any], object], options: Any) -> int:
    """A command's status: 2 for a mistake in the input, 1 for a run that could not continue, or for a bug of ours."""
    try:
        found = run(options)
    except BrokenPipeError:  # the reader (head, less) has seen enough; keep Python from complaining when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FileNotFoundError, ImportError) as error:
        return _failed(error, 2)
    except (ValueError, TypeError) as error:
        return _failed(error, 2) if _was_raised(error) else _unexpected(error)
    except (RunError, OSError) as error:  # a reward that fails, a full disk: not a mistake in the input
        return _failed(error, 1)
    except KeyboardInterrupt:
        print("bandpo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            return _failed(f"a file of the run is refused, since loading it could run code: {error}", 1)
        return _unexpected(error)
    return found if isinstance(found, int) else 0


def _failed(error: Exception | str, status: int) -> int:
    """One line, or with BANDPO_DEBUG=1 also where it came from."""
    where = ""
    if os.environ.get("BANDPO_DEBUG"):
        _print_traceback()
    elif isinstance(error, ValueError | TypeError) and not _is_ours(_origin(error)):
        where = " (BANDPO_DEBUG=1 shows which library says so)"
    print(f"bandpo: {printable(redact_text(str(error) or type(error).__name__), keep=LINES)}{where}", file=sys.stderr)
    return status


def _unexpected(error: Exception) -> int:
    """An error that nobody raised for the user to read: it must not look like a mistake in the input."""
    _print_traceback()
    print(
        f"bandpo: unexpected {type(error).__name__}. This is a bug in bandpo, or in a library that it calls; please report it "
        "with the lines above",
        file=sys.stderr,
    )
    return 1


def _print_traceback() -> None:
    import traceback

    print(printable(redact_text(traceback.format_exc()), keep=LINES), end="", file=sys.stderr)


def _was_raised(error: BaseException) -> bool:
    """Whether an error was raised by a `raise`, with a message for people, and did not come out of an expression.

    `int(None)` and `None + 1` have no `raise` statement at the place they come from: in our code they are bugs. Libraries check
    what they are given in ways of their own.
    """
    import dis

    origin = _origin(error)
    if origin is None or not _is_ours(origin):
        return True
    return dis.opname[origin.tb_frame.f_code.co_code[origin.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")


def _origin(error: BaseException) -> TracebackType | None:
    """The innermost place of a traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _is_ours(trace: TracebackType | None) -> bool:
    place = Path(bandpo.__file__).parent
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(place)


def _train(arguments: list[str]) -> None:
    from bandpo.train.command import train

    train(arguments)


def _evaluate(options: argparse.Namespace) -> None:
    from bandpo._system.locks import claim_file, released
    from bandpo.train.evaluate_command import evaluate_model

    with nullcontext() if options.output is None else released(claim_file(options.output)):
        evaluate_model(options)


def _compare(options: argparse.Namespace) -> int:
    from bandpo.lab.comparison.command import compare

    return int(not compare(options).complete)


def _lab_preference(options: argparse.Namespace) -> None:
    from bandpo.lab.experiments.command import lab_preference

    lab_preference(options)


def _lab_selection(options: argparse.Namespace) -> int:
    from bandpo.lab.experiments.command import lab_selection

    return int(bool(lab_selection(options)["failures"]))


def _doctor(options: argparse.Namespace) -> int:
    from bandpo.doctor.command import doctor

    return doctor(options)


def _bounds(options: argparse.Namespace) -> None:
    from bandpo.plots.command import show_bounds

    show_bounds(options)


def _objectives(options: argparse.Namespace) -> None:
    from bandpo.plots.command import show_objectives

    show_objectives(options)


if __name__ == "__main__":
    raise SystemExit(main())
