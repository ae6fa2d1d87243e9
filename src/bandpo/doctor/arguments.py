"""Options of `bandpo doctor`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bandpo doctor`.

    Args:
        parser: Parser of the command.
    """
    parser.description = (
        "Examines a configuration (TRL's or bandpo's YAML; a Python script or notebook with GRPOConfig(...); verl's YAML, or a "
        "file of overrides; a script that starts verl, TRL or ms-swift), a log (metrics.jsonl), "
        "a saved batch (.safetensors, .pt, .npz), or the folder of a run. Each line says what was found, why, and what to set. "
        "The exit status is 1 if there is a problem (!!), else 0."
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="FILE", help="file or folder; or key=value, which overrides the configuration")
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
    add("--json", action="store_true", help="print JSON")
