"""The folder of a run: where it is, what is in it from the start, and what a killed run left there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from bandpo._system.about import about
from bandpo._system.files import read_yaml, write_json, write_text
from bandpo._system.locks import Claim, InUseError, claim_output
from bandpo._system.secrets import redact
from bandpo.integrations.trl.checkpoint import latest_checkpoint
from bandpo.train.config import RunConfig, TrainerConfig

_NOT_SAVED = ("output_dir", "resume_from_checkpoint", "dry_run")

_claims: ContextVar[list[Claim] | None] = ContextVar("claims", default=None)


@contextmanager
def released_at_end() -> Iterator[None]:
    """A decorator for a run: releases the folder that the run claimed, however the run ends."""
    claims: list[Claim] = []
    before = _claims.set(claims)
    try:
        yield
    finally:
        _claims.reset(before)
        for claim in claims:
            claim.release()


def choose_folder(run: RunConfig, args: TrainerConfig, given: dict[str, Any], say: Callable[[str], None]) -> str | None:
    """Set the output folder; the checkpoint to resume, if any.

    Nothing that exists is overwritten: a folder with a run in it is refused unless that run is resumed. `latest` takes up
    whatever a killed run left: its last whole checkpoint, or its beginning where there is none yet. The main process claims the
    folder before anything slow, so that of two runs at once each has its own, and one that is named and in use is refused.

    Args:
        run: Our config.
        args: TRL's.
        given: The settings as they were given.
        say: Takes messages.
    """
    if "output_dir" not in given:
        label = args.objective.replace(":", "-") if run.method == "grpo" else run.method
        name = f"{label}-{Path(run.task or run.dataset or '').stem}-seed{args.seed}"
        wanted = Path("runs") / name
    else:
        wanted = Path(args.output_dir or ".")
    folder = _claimed(wanted, numbered="output_dir" not in given and args.resume_from_checkpoint is None)
    args.output_dir = str(folder)
    resume = args.resume_from_checkpoint
    if resume is None:
        if (folder / "metrics.jsonl").exists():
            raise ValueError(
                f"output_dir {folder} holds a run already; choose another, or resume with --resume_from_checkpoint latest"
            )
        return None
    if resume == "latest":
        if changed := _changes(folder, given):
            say(f"this run began with other settings: {changed}. It goes on with the new ones")
        found = latest_checkpoint(folder, say)
        if found is None and run.method != "grpo" and run.pairs is None and (folder / "rounds").is_dir():
            return str(folder / "rounds")  # a preference run finds its last whole round itself
        if found is None:
            say(f"{folder} has no whole checkpoint yet: the run starts from its beginning")
        return None if found is None else str(found)
    if not Path(resume).is_dir():
        raise ValueError(f"resume_from_checkpoint: {resume} is no folder")
    return resume


def _claimed(wanted: Path, *, numbered: bool) -> Path:
    """The folder, held by the main process for all; the same error on every process where that cannot be.

    Args:
        wanted: The folder.
        numbered: Whether it may get a number where it is in use or holds a run.
    """
    outcome: Path | Exception | None = None
    if PartialState().is_main_process:
        try:
            outcome = _claim_free(wanted) if numbered else _hold(claim_output(wanted), wanted)
        except (ValueError, OSError) as error:
            outcome = error
    [outcome] = broadcast_object_list([outcome])
    if isinstance(outcome, Exception):
        raise outcome
    assert outcome is not None
    return outcome


def _hold(claim: Claim, folder: Path) -> Path:
    if (claims := _claims.get()) is not None:
        claims.append(claim)
    return folder


def _claim_free(wanted: Path) -> Path:
    """The folder itself, or else its name with the first number that is free."""
    folder, number = wanted, 2
    while True:
        if not (folder / "metrics.jsonl").exists():
            try:
                claim = claim_output(folder)
            except InUseError:  # by a run that has just begun
                pass
            else:
                if not (folder / "metrics.jsonl").exists():  # it may have begun and ended since we looked
                    return _hold(claim, folder)
                claim.release()
        folder, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1


def make_folder(folder: Path, run: RunConfig, args: TrainerConfig, given: dict[str, Any], *, resumed: bool) -> None:
    """Make it, with the configuration and the environment of the run; it is not begun before they are there.

    Args:
        folder: To make.
        run: Our config.
        args: TRL's.
        given: The settings as they were given.
        resumed: From a checkpoint; what the folder says of its beginning stays.
    """
    PartialState().wait_for_everyone()  # all have looked before anything is made
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not resumed:
            for name in ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "failed_reward.jsonl"):
                (folder / name).unlink(missing_ok=True)
            write_text(folder / "config.yaml", yaml.safe_dump(_saved(given), sort_keys=False, allow_unicode=True))
            resolved = redact({**asdict(run), **args.to_dict()})
            write_text(folder / "config.resolved.yaml", yaml.safe_dump(_plain(resolved), allow_unicode=True))
            write_json(folder / "env.json", environment(args))
            (folder / "metrics.jsonl").touch()
    PartialState().wait_for_everyone()


def environment(args: TrainerConfig, seconds: float | None = None) -> dict[str, Any]:
    """The environment of a run, for env.json; the seconds are known at its end.

    Args:
        args: TRL's config.
        seconds: Of this session.
    """
    return about(
        seed=args.seed, seconds=None if seconds is None else round(seconds, 1), device=str(args.device),
        processes=PartialState().num_processes,
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """As YAML has it; what it has no form for is written as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def is_finished(folder: Path, given: dict[str, Any]) -> bool:
    """Whether a run with these very settings has left its model and its report, which is written last.

    Args:
        folder: Of the run.
        given: The settings as they were given.
    """
    left = (folder / "model").is_dir() and (folder / "report.html").exists()
    return left and _changes(folder, given) == ""


def _changes(folder: Path, given: dict[str, Any]) -> str | None:
    """How the settings differ from those that the run in the folder began with; None where there is no run."""
    try:
        began = read_yaml(folder / "config.yaml")
    except (OSError, ValueError):
        return None
    now = _saved(given)
    changed = [k for k in {**began, **now} if began.get(k) != now.get(k)]
    return ", ".join(f"{k} {began.get(k)!r} -> {now.get(k)!r}" for k in changed)


def _saved(given: dict[str, Any]) -> dict[str, Any]:
    """The settings as config.yaml has them: without what belongs to this session only, and without secrets."""
    return redact({k: v for k, v in given.items() if k not in _NOT_SAVED})
