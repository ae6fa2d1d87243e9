"""The command `bandpo lab evidence`."""

import argparse
from pathlib import Path
from typing import Any

import torch

from bandpo._system.about import about
from bandpo._system.bounded import parse_json, read_regular
from bandpo._system.files import finite_or_null, write_json, write_text
from bandpo._system.locks import claim_output, released
from bandpo._system.progress import Progress
from bandpo.lab.evidence.figures import draw
from bandpo.lab.evidence.protocol import Protocol, read
from bandpo.lab.evidence.study import restricted, study


def lab_evidence(options: argparse.Namespace) -> dict[str, Any]:
    """Run the registered protocol, or make what is missing of it.

    The output folder gets evidence.json, forks.json (as `bandpo lab forks` writes it), an SVG file for each figure, and a
    folder for each part.

    Args:
        options: The options of `bandpo lab evidence`.

    Returns:
        The content of evidence.json.

    Raises:
        ValueError: If an option has a value that is not allowed, or the protocol does not fit the experiments.
    """
    if options.device != "cpu":
        raise ValueError(
            f"--device {options.device}: the protocol of bandpo lab evidence is one for the CPU, whose results are the same on "
            "every machine of a kind; choose --device cpu"
        )
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    protocol = read(options.preset)
    only, arms = (None if names is None else names.split(",") for names in (options.only, options.arms))
    protocol = restricted(protocol, only, arms)
    progress = Progress()
    torch.set_num_threads(1)
    folder: Path = options.output
    with released(claim_output(folder)):
        for line in changed_since(folder / "evidence.json", protocol):
            progress.say(line)
        found: dict[str, Any] = finite_or_null(study(protocol, folder, options.jobs, progress.say))
        write_json(folder / "evidence.json", found, indent=None)
        if "forks" in found:  # what tools/halves.py reads
            write_json(folder / "forks.json", {**about(), "bandpo": found["bandpo"], **found["forks"]}, indent=None)
        for name, picture in draw(found).items():
            write_text(folder / f"{name}.svg", picture)
    for claim in found["judged"]:
        if claim["kind"] == "primary":
            progress.say(f"{claim['text']} ({claim['source']}): {claim['verdict']}")
    progress.say(
        f"{folder / 'evidence.json'}; python tools/evidence.py --from {folder / 'evidence.json'} writes the pages"
    )
    return found


def changed_since(path: Path, protocol: Protocol) -> list[str]:
    """What an evidence.json, which is about to be replaced, has of another protocol or preset; a line for each.

    Runs are kept by their content, so that those which the new protocol asks for too are used again. It is the judgement that
    may be another one.

    Args:
        path: The evidence.json; it need not be there.
        protocol: The protocol of this command.
    """
    try:
        found: Any = parse_json(read_regular(path), str(path))
        before, preset = found["protocol"]["sha256"], found["preset"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        return [f"{path} cannot be read ({error}); it is replaced"]
    lines: list[str] = []
    if before != protocol.sha256:
        lines.append(
            f"{path} is of another protocol (SHA-256 {str(before)[:12]}…, now {protocol.sha256[:12]}…): runs that both ask for "
            "are used again, and all claims are judged by the protocol as it is now"
        )
    if preset != protocol.preset:
        lines.append(
            f"{path} is of the preset {preset}, and is replaced by that of {protocol.preset}; runs that both ask for are used "
            "again"
        )
    return lines
