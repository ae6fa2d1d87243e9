"""Options of `bandpo doctor`."""

import argparse
from pathlib import Path

from bandpo._system.options import add_examples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bandpo doctor`.

    Args:
        parser: Parser of the command.
    """
    parser.description = (
        "Examines a configuration (TRL's or bandpo's YAML; a Python script or notebook with GRPOConfig(...); YAML, TOML or a "
        "launch script of verl, ms-swift, OpenRLHF, SkyRL, slime, NeMo-RL, prime-rl or rLLM), a log (metrics.jsonl, "
        "trainer_state.json, verl's console, TensorBoard, trackio, a table of W&B), "
        "a saved batch (.safetensors, .pt, .npz), or the folder of a run. Each line says what was found, why, and what to set. "
        "The worst is printed first. The exit status is 2 if a file could not be examined, else 1 if there is a problem (!!), "
        "else 0."
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="FILE", help="file or folder; or key=value, which overrides the configuration")
    add(
        "--target",
        type=float,
        default=0.01,
        help="share of tokens to clip, for the radius that is computed from a batch (default: 0.01)",
    )
    add("--processes", type=int, default=1, help="number of training processes, for generation_batch_size (default: 1)")
    add(
        "--vocabulary",
        type=int,
        help="vocabulary size of the model, for the memory of its logits (default: from the model's folder)",
    )
    add("--run", default="", metavar="NAME", help="run to read, from a log with several (W&B's CSV, trackio)")
    add("--one-run", action="store_true", help="the logs are parts of one run, in this order, and are read as one")
    add(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="local folder of a model (config.json, .safetensors), which scores the tokens of a batch again: the noise of its "
        "log-probs, and what truncated sampling removes",
    )
    add("--json", action="store_true", help="print JSON; its schema is bandpo/doctor/findings.schema.json")
    add("--html", type=Path, metavar="FILE", help="also write the findings as a page, which needs nothing but itself")
    add(
        "--explain",
        nargs="?",
        const="",
        metavar="RULE",
        help="print what a rule looks at, why, its healthy range and what to set in each host; without RULE the rules",
    )
    add_examples(
        parser,
        "doctor run.yaml                          # a configuration of TRL, verl, bandpo and others",
        "doctor run.yaml learning_rate=1e-5       # the same with another value",
        "doctor RUN --html findings.html          # the folder of a run",
        "doctor --explain entropy",
    )
