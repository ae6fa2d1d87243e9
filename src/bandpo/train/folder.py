"""The folder of a run: how it is chosen, what is written into it before training, and what a killed run left in it."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list  # pyright: ignore[reportUnknownVariableType]

from bandpo._system.about import about, plain
from bandpo._system.files import read_yaml, write_json, write_text
from bandpo._system.locks import Claim, InUseError, claim_output
from bandpo._system.secrets import redact, redact_text
from bandpo.integrations.trl.checkpoint import latest_checkpoint
from bandpo.train.config import RunConfig, TrainerConfig

_NOT_SAVED = ("output_dir", "resume_from_checkpoint", "dry_run")
"""Settings of one session, which config.yaml leaves out: the file repeats the run, not the session."""

_claims: ContextVar[list[Claim] | None] = ContextVar("claims", default=None)


@contextmanager
def released_at_end() -> Generator[None]:
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
    """Set the output folder in `args`, and find the checkpoint to resume from.

    No existing run is overwritten: a folder that holds a run is refused unless that run is resumed. With `latest` a killed run
    continues from its last complete checkpoint, or starts again where it has none yet. The main process claims the folder
    before any slow step: two runs that start at the same time get different folders, and a named folder in use is refused.

    Args:
        run: bandpo's part of the configuration.
        args: TRL's part of the configuration.
        given: The settings that the user gave.
        say: Prints a message.

    Returns:
        Folder of the checkpoint, None for a new run.

    Raises:
        ValueError: If the folder is in use or holds a run, or there is no such checkpoint.
    """
    folder = _claimed(_wanted(run, args, given), numbered=_may_be_numbered(args, given))
    args.output_dir = str(folder)
    resume = args.resume_from_checkpoint
    if resume is None:
        if (folder / "metrics.jsonl").exists():
            raise ValueError(
                f"output_dir {folder} holds a run already; choose another, or resume with --resume_from_checkpoint latest"
            )
        return None
    if resume == "latest":
        return _latest(folder, run, given, say)
    if not Path(resume).is_dir():
        raise ValueError(f"resume_from_checkpoint: {resume} is no folder")
    return resume


def _wanted(run: RunConfig, args: TrainerConfig, given: dict[str, Any]) -> Path:
    """The folder that the user names, or else one named after the objective, the data and the seed."""
    if "output_dir" in given:
        return Path(args.output_dir or ".")
    label = args.objective.replace(":", "-") if run.method == "grpo" else run.method
    return Path("runs") / f"{label}-{Path(run.task or run.dataset or '').stem}-seed{args.seed}"


def _may_be_numbered(args: TrainerConfig, given: dict[str, Any]) -> bool:
    return "output_dir" not in given and args.resume_from_checkpoint is None


def _latest(folder: Path, run: RunConfig, given: dict[str, Any], say: Callable[[str], None]) -> str | None:
    """Where a killed run continues; None for its beginning."""
    if changed := _changes(folder, given):
        say(f"this run began with other settings: {changed}. It continues with the new ones")
    found = latest_checkpoint(folder, say)
    if found is not None:
        return str(found)
    if run.method != "grpo" and run.pairs is None and (folder / "rounds").is_dir():
        return str(folder / "rounds")  # a preference run finds its last complete round itself
    say(f"{folder} has no complete checkpoint yet: the run starts from its beginning")
    return None


def _claimed(wanted: Path, *, numbered: bool) -> Path:
    """The folder, claimed by the main process for all processes; where that fails, every process raises the same error.

    Args:
        wanted: The folder.
        numbered: Whether a number may be added to its name when it is in use or holds a run.
    """
    outcome: Path | Exception | None = None
    if PartialState().is_main_process:
        try:
            outcome = _claim_free(wanted) if numbered else _hold(claim_output(wanted), wanted)
        except (ValueError, OSError) as error:
            outcome = error
    [outcome] = cast("list[Path | Exception | None]", broadcast_object_list([outcome]))
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
            except InUseError:  # a run has just begun there
                pass
            else:
                if not (folder / "metrics.jsonl").exists():  # a run may have begun and ended since the first check
                    return _hold(claim, folder)
                claim.release()
        folder, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1


def make_folder(folder: Path, run: RunConfig, args: TrainerConfig, given: dict[str, Any], *, resumed: bool) -> None:
    """Make the folder with the configuration and the environment of the run; training starts after they are written.

    Args:
        folder: Folder to make.
        run: bandpo's part of the configuration.
        args: TRL's part of the configuration.
        given: The settings that the user gave.
        resumed: Whether the run continues from a checkpoint; then the files about its beginning are kept.
    """
    PartialState().wait_for_everyone()  # every process has looked at the folder before it changes
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not resumed:
            for name in ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "failed_reward.jsonl"):
                (folder / name).unlink(missing_ok=True)
            write_text(folder / "config.yaml", yaml.safe_dump(_saved(given), sort_keys=False, allow_unicode=True))
            resolved = redact({**asdict(run), **args.to_dict()})
            write_text(folder / "config.resolved.yaml", yaml.safe_dump(plain(resolved), allow_unicode=True))
            write_json(folder / "env.json", environment(args))
            (folder / "metrics.jsonl").touch()
    PartialState().wait_for_everyone()


def environment(args: TrainerConfig, seconds: float | None = None) -> dict[str, Any]:
    """The environment of a run, for env.json.

    Args:
        args: TRL's part of the configuration.
        seconds: Duration of this session in seconds, known at its end.
    """
    return about(
        seed=args.seed,
        seconds=None if seconds is None else round(seconds, 1),
        device=str(args.device),
        processes=PartialState().num_processes,
    )


def is_finished(folder: Path, given: dict[str, Any]) -> bool:
    """Whether a run with exactly these settings has left its model and its report, which is written last.

    Args:
        folder: Folder of the run.
        given: The settings that the user gave.
    """
    left = (folder / "model").is_dir() and (folder / "report.html").exists()
    return left and _changes(folder, given) == ""


class HidesSecretsInCard:
    """For a trainer: the model card (README.md) that TRL writes has no secrets, for example from `hub_model_id`."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card as TRL does, then hide the secrets in it."""
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        trainer = cast("Any", self)
        card = Path(trainer.args.output_dir) / "README.md"
        if trainer.is_world_process_zero() and card.is_file():
            write_text(card, redact_text(card.read_text(encoding="utf-8")))


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
    """The settings as config.yaml holds them: without those of one session, and without secrets."""
    return redact({k: v for k, v in given.items() if k not in _NOT_SAVED})
