"""Options of `bandpo evaluate`, `check-reward` and `report`; those of `bandpo train` are read in `bandpo.train.config`."""

import argparse
from contextlib import nullcontext
from pathlib import Path

from bandpo._system.options import add_examples, put_in_sections

EVALUATION_SEED = 1234
"""Seed of the sampling in every evaluation, so that evaluations of one model agree."""

_EVALUATE_SECTIONS = {
    "prompts and reward": (
        *(
            "as_run",
            "task",
            "shots",
            "dataset",
            "dataset_config",
            "dataset_split",
            "prompt_column",
            "answer_column",
            "system_prompt",
        ),
        *("reward", "reward_workers", "prompts", "bad_rows"),
    ),
    "sampling": (
        *("samples", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("max_new_tokens", "batch_size", "seed"),
    ),
    "computation and safety": ("use_cpu", "bf16", "trust_remote_code"),
}
"""The sections of the help of `bandpo evaluate`."""


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bandpo evaluate`.

    Args:
        parser: Parser of the command.
    """
    parser.description = (
        "Samples a model on prompts and scores the samples: mean@k, pass@k and maj@k with 95% intervals over the prompts. For "
        "the model of a bandpo run (RUN, RUN/model, RUN/checkpoint-N) the prompts that the run held out are used, with the "
        "run's settings; options that are given take precedence, and the result is written to RUN/evaluations. Another model "
        "needs --task, or --dataset and --reward, and its result is written with --output only. Several models are scored on "
        "the same prompts, with the same reward and sampler, and compared with the first one, prompt by prompt; a model of no "
        "run is scored as the first run among them. A file of results is read in place of its model, which is not sampled "
        "again."
    )
    add = parser.add_argument
    add(
        "models",
        metavar="MODEL",
        nargs="+",
        help="folder of a run, folder or Hub name of a causal LM, GGUF file, or wheel:NAME; several are compared",
    )
    add(
        "--as",
        dest="as_run",
        metavar="RUN",
        help="score all models on the prompts of this run, with its reward and sampler (default: each as its own run)",
    )
    add("--task", help="built-in task (default: the run's)")
    add("--shots", type=int, help="solved examples in the chat before each question of a task (default: the run's)")
    add("--dataset", help="Hub name, or a .jsonl, .json, .parquet or .csv file (default: the run's)")
    add("--dataset-config", help="configuration of a Hub dataset")
    add("--dataset-split", help="split of a Hub dataset (default: test)")
    add("--prompt-column", help="column with the prompt (default: the run's, or prompt)")
    add("--answer-column", help="column with the reference answer (default: the run's, or answer)")
    add("--system-prompt", help="system prompt of text prompts (default: the run's)")
    add(
        "--reward",
        help="math, math-lenient, a task's name, or package.module:NAME, which is imported (default: the run's first, or the "
        "task's)",
    )
    add("--reward-workers", type=int, help="processes of the math rewards (default: as many as CPUs, at most 16)")
    add("--prompts", type=int, help="number of prompts at most (default: the run's, or 256)")
    add("--samples", type=int, help="samples of each prompt, the k of mean@k (default: the run's, or 8)")
    add("--temperature", type=float, help="sampling temperature, 0 is greedy (default: the run's, or 1.0)")
    add("--top-p", type=float, help="probability mass that is sampled from (default: the run's, or 1.0)")
    add(
        "--top-k",
        type=int,
        help="number of the most likely tokens that are sampled from, 0 for all (default: the run's, or 0)",
    )
    add(
        "--min-p",
        type=float,
        help="smallest probability in sampling, relative to the largest (default: the run's, or none)",
    )
    add(
        "--repetition-penalty",
        type=float,
        help="penalty on tokens that were there before (default: the run's, or 1, none)",
    )
    add("--max-new-tokens", type=int, help="tokens of the longest completion (default: the run's, the task's, or 1024)")
    add("--batch-size", type=int, help="completions sampled at once (default: the run's, or 512)")
    add("--seed", type=int, default=EVALUATION_SEED, help=f"seed of the sampling (default: {EVALUATION_SEED})")
    add(
        "--bad-rows",
        choices=("error", "skip"),
        help="what to do with rows that cannot be used or scored: end with an error, or leave them out and count them "
        "(default: the run's, or error)",
    )
    add("--use-cpu", type=_truth, metavar="true|false", help="compute on the CPU (default: where there is no GPU)")
    add(
        "--bf16",
        type=_truth,
        metavar="true|false",
        help="compute in bfloat16 (default: as the run did if the machine can, else where the machine is faster in it)",
    )
    add("--trust-remote-code", action="store_true", help="allow running code that the folder of the model contains")
    add("--output", type=Path, help="JSON file to write the result to, with the counts of each prompt")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="figure of pass@k over k, mean@k and maj@k with intervals: .png, .svg, .pdf, or .html with the table",
    )
    put_in_sections(parser, _EVALUATE_SECTIONS)
    add_examples(
        parser,
        "evaluate RUN                              # as the run evaluated itself",
        "evaluate RUN --temperature 0 --samples 1  # greedy",
        "evaluate RUN RUN --plot pass.svg          # side by side, on the same prompts",
        "evaluate MODEL --dataset data.jsonl --reward math",
        "evaluate FILE.gguf --task sums --shots 1",
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bandpo report`.

    Args:
        parser: Parser of the command.
    """
    parser.description = (
        "Writes the report of a run of bandpo train from the files in its folder, at any time: also while the run trains, and "
        "after it was interrupted; then it names the last step. No model is loaded, and nothing that a file names is imported."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="page to write (default: report.html in the folder)"
    )
    add_examples(
        parser,
        "report RUN                     # also while the run trains",
        "report RUN --output page.html",
    )


def add_check_reward_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bandpo check-reward`.

    Args:
        parser: Parser of the command.
    """
    parser.description = (
        "Scores the reference answers of a dataset as if they were completions, with the rewards of a run, and lists the rows "
        "that would be unscored. The status is 1 if there are some, or if reward math refuses a row's own answer."
    )
    add = parser.add_argument
    add("--config", metavar="FILE.yaml", help="file of bandpo train; the options below take precedence")
    add("--dataset", help="Hub name, or a .jsonl, .json, .parquet or .csv file (default: the file's)")
    add("--dataset-config", help="configuration of a Hub dataset")
    add("--dataset-split", help="split of a Hub dataset (default: train)")
    add("--prompt-column", help="column with the prompt (default: the file's, or prompt)")
    add("--answer-column", help="column with the reference answer, also a part of one (default: the file's, or answer)")
    add(
        "--reward",
        nargs="+",
        help="math, math-lenient, or package.module:NAME, which is imported (default: the file's)",
    )
    add(
        "--bad-rows",
        choices=("error", "skip"),
        help="what to do with rows that have no prompt or no answer: end with an error, or leave them out and count them "
        "(default: the file's, or error)",
    )
    add("--rows", type=_count, default=32, help="number of rows, the first ones (default: 32)")
    add(
        "--messages",
        action="store_true",
        help="give messages to the rewards also for text prompts, as with a chat template",
    )
    add_examples(
        parser,
        "check-reward --config run.yaml",
        "check-reward --dataset data.jsonl --answer-column solution --reward math my_module:format",
    )


def run_check_reward(options: argparse.Namespace) -> int:
    """Run `bandpo check-reward`.

    Args:
        options: The options of the command.

    Returns:
        The exit status.
    """
    from bandpo.train.check_reward import check_reward

    return check_reward(options)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows, which is 1 or more")
    return int(text)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def run_evaluate(options: argparse.Namespace) -> None:
    """Run `bandpo evaluate`; one process at a time writes its output file.

    Args:
        options: The options of the command.
    """
    from bandpo.train.evaluate_options import asked_jobs

    jobs = asked_jobs(options)  # what follows imports transformers
    from bandpo._system.locks import claim_file, released
    from bandpo.train.evaluate_command import evaluate_models

    with nullcontext() if options.output is None else released(claim_file(options.output)):
        evaluate_models(jobs, options)
