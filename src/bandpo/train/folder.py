"""The folder of a run: how it is chosen, what is written into it before training, and what a killed run left in it."""

import os
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
from bandpo._system.errors import printable
from bandpo._system.files import read_yaml, write_json, write_jsonl, write_text
from bandpo._system.locks import Claim, InUseError, claim_output
from bandpo._system.secrets import redact, redact_text
from bandpo.integrations.trl.checkpoint import latest_checkpoint
from bandpo.train.config import RunConfig, TrainerConfig
from bandpo.train.record import RESUMES, Changes, Parts, resume_lines, resumes, told

_NOT_SAVED = ("output_dir", "resume_from_checkpoint", "dry_run")
"""Settings of one session, which config.yaml leaves out: the file repeats the run, not the session."""

_FIXED = (
    *(
        "method",
        "model",
        "task",
        "shots",
        "dataset",
        "dataset_config",
        "dataset_split",
        "pairs",
        "prompt_column",
        "answer_column",
    ),
    *("system_prompt", "reward", "seed", "eval_dataset", "eval_dataset_split", "eval_prompts", "eval_samples"),
    *("eval_temperature", "lora_rank", "lora_alpha", "warm_up_steps", "max_completion_length", "temperature", "top_p"),
    *("top_k", "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs"),
)
"""Settings that a resumed run must have as it began: its model, its prompts, and what its first evaluation has measured."""
_COMPUTE = ("use_cpu", "bf16", "fp16")
"""Settings that the machine may have chosen, so that they can differ where the user has set nothing."""
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
        _refuse_used(folder)
        return None
    if resume == "latest":
        found = _latest(folder, run, say)
    elif not Path(resume).is_dir():
        raise ValueError(f"resume_from_checkpoint: {resume} is no folder")
    else:
        found = resume
    if changed := _changes(folder, run, args, given):
        _refuse_changes(folder, changed)
        say(f"this run began with other settings: {told(changed)}. It continues with the new ones")
    return found


def mistakes_of_folder(run: RunConfig, args: TrainerConfig, given: dict[str, Any]) -> list[str]:
    """Why `choose_folder` would refuse the folder of a run; nothing is claimed or made.

    Args:
        run: bandpo's part of the configuration.
        args: TRL's part of the configuration.
        given: The settings that the user gave.
    """
    folder, resume = _wanted(run, args, given), args.resume_from_checkpoint
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        return [f"output_dir {folder}: {there} is a file"]
    if not os.access(there, os.W_OK):
        return [f"output_dir {folder} cannot be made or written: {there} is not writable"]
    try:
        if resume is None:
            if not _may_be_numbered(args, given):
                _refuse_used(folder)
        elif resume != "latest" and not Path(resume).is_dir():
            return [f"resume_from_checkpoint: {resume} is no folder"]
        elif changed := _changes(folder, run, args, given):
            _refuse_changes(folder, changed)
    except ValueError as error:
        return [str(error)]
    return []


def _refuse_used(folder: Path) -> None:
    if (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"output_dir {folder} holds a run already; choose another, or resume with --resume_from_checkpoint latest"
        )


def _refuse_changes(folder: Path, changed: Changes) -> None:
    fixed = {name: values for name, values in changed.items() if name in _FIXED}
    if fixed:
        raise ValueError(
            f"the run in {folder} began with other settings: {told(fixed)}. Its first evaluation and its prompts depend on "
            "them: set them as they were, or start a new run from its weights (--model CHECKPOINT)"
        )


def _wanted(run: RunConfig, args: TrainerConfig, given: dict[str, Any]) -> Path:
    """The folder that the user names, or else one named after the objective, the data and the seed."""
    if "output_dir" in given:
        return Path(args.output_dir or ".")
    label = method_of(run, args).replace(":", "-")
    return Path("runs") / f"{label}-{Path(run.task or run.dataset or '').stem}-seed{args.seed}"


def method_of(run: RunConfig, args: TrainerConfig) -> str:
    """The name of a run's method: its objective, or the name of the preference method, which several may share.

    Args:
        run: bandpo's part of the configuration.
        args: TRL's part of the configuration.
    """
    return args.objective if run.method == "grpo" else run.method


def _may_be_numbered(args: TrainerConfig, given: dict[str, Any]) -> bool:
    return "output_dir" not in given and args.resume_from_checkpoint is None


def _latest(folder: Path, run: RunConfig, say: Callable[[str], None]) -> str | None:
    """Where a killed run continues; None for its beginning."""
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


def make_folder(
    folder: Path, run: RunConfig, args: TrainerConfig, given: dict[str, Any], *, checkpoint: str | None
) -> None:
    """Make the folder with the configuration and the environment of the run; training starts after they are written.

    A resumed run keeps the files about its beginning. Where its settings have changed, its configuration is written anew, what
    was changed at which step is added to resumes.jsonl, and the report of an earlier end gets another name.

    Args:
        folder: Folder to make.
        run: bandpo's part of the configuration.
        args: TRL's part of the configuration.
        given: The settings that the user gave.
        checkpoint: The folder that the run continues from, None for a new run.
    """
    PartialState().wait_for_everyone()  # every process has looked at the folder before it changes
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            for name in ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "failed_reward.jsonl", RESUMES):
                (folder / name).unlink(missing_ok=True)
            _write_settings(folder, run, args, given)
            write_json(folder / "env.json", environment(args))
            (folder / "metrics.jsonl").touch()
        else:
            _note_changes(folder, run, args, given, Path(checkpoint))
    PartialState().wait_for_everyone()


def _note_changes(folder: Path, run: RunConfig, args: TrainerConfig, given: dict[str, Any], checkpoint: Path) -> None:
    """Write the settings of a resumed run, where they have changed or where the folder is a new one."""
    changed = _changes(folder, run, args, given)
    if changed is None:  # it continues a run of another folder
        _write_settings(folder, run, args, given)
        write_json(folder / "env.json", environment(args))
        return
    step = int(number) if (number := checkpoint.name.rpartition("-")[2]).isdecimal() else None
    rows = _with_resume(resumes(folder), step, changed)
    if not changed and rows == resumes(folder):
        return
    report = folder / "report.html"
    if report.exists():
        report.rename(folder / f"report-before-{'resume' if step is None else f'step-{step}'}.html")
    write_jsonl(folder / RESUMES, rows)
    _write_settings(folder, run, args, given)


def _with_resume(rows: list[dict[str, Any]], step: int | None, changed: Changes) -> list[dict[str, Any]]:
    """The rows of resumes.jsonl with what is changed at a step. Later steps are made again: theirs become part of it."""
    again = [] if step is None else [row for row in rows if row["step"] is not None and row["step"] >= step]
    before: dict[str, Any] = {name: old for name, (old, _) in changed.items()}
    for row in reversed(again):
        before |= {name: old for name, (old, _) in row["changed"].items()}
    last = {name: new for row in again for name, (_, new) in row["changed"].items()}
    last |= {name: new for name, (_, new) in changed.items()}
    found = {name: [before[name], last[name]] for name in last if before[name] != last[name]}
    kept = [row for row in rows if row not in again]
    return [*kept, *([{"step": step, "changed": found}] if found else [])]


def _write_settings(folder: Path, run: RunConfig, args: TrainerConfig, given: dict[str, Any]) -> None:
    """Write config.yaml, with what was changed as comments, and config.resolved.yaml."""
    comments = "".join(f"# {printable(line)}\n" for line in resume_lines(folder))
    text = yaml.safe_dump(_saved(given), sort_keys=False, allow_unicode=True)
    write_text(folder / "config.yaml", comments + text)
    write_text(folder / "config.resolved.yaml", yaml.safe_dump(_resolved(run, args), allow_unicode=True))


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


def is_finished(folder: Path, run: RunConfig, args: TrainerConfig, given: dict[str, Any]) -> bool:
    """Whether a run with exactly these settings has left its model and its report, and was not resumed since.

    Args:
        folder: Folder of the run.
        run: bandpo's part of the configuration.
        args: TRL's part of the configuration.
        given: The settings that the user gave.
    """
    parts = Parts.read(folder)
    left = (folder / "model").is_dir() and (folder / "report.html").exists() and (parts is None or parts.finished)
    return left and _changes(folder, run, args, given) == {}


class HasOwnCard:
    """For a trainer: where TRL writes its model card, at each checkpoint, the card of the run is written instead."""

    write_card: Callable[[], None] | None = None
    """Writes the card of the run; None leaves the card to TRL, and hides the secrets in it."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of the run, or that of TRL without secrets, for example from `hub_model_id`."""
        trainer = cast("Any", self)
        if self.write_card is not None:
            if trainer.is_world_process_zero():
                self.write_card()
            return
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        card = Path(trainer.args.output_dir) / "README.md"
        if trainer.is_world_process_zero() and card.is_file():
            write_text(card, redact_text(card.read_text(encoding="utf-8")))


def _changes(folder: Path, run: RunConfig, args: TrainerConfig, given: dict[str, Any]) -> Changes | None:
    """The settings that differ from those of the run in the folder, with defaults filled in; None where there is no run."""
    try:
        began, before = (read_yaml(folder / name) for name in ("config.yaml", "config.resolved.yaml"))
    except (OSError, ValueError):
        return None
    now, saved = _resolved(run, args), _saved(given)
    pairs = {k: (before.get(k), now.get(k)) for k in {**began, **saved, **dict.fromkeys(_COMPUTE)}}
    return {k: (old, new) for k, (old, new) in pairs.items() if old != new}


def _resolved(run: RunConfig, args: TrainerConfig) -> dict[str, Any]:
    """Every setting, in values that YAML can hold, without secrets."""
    return plain(redact({**asdict(run), **args.to_dict()}))


def _saved(given: dict[str, Any]) -> dict[str, Any]:
    """The settings as config.yaml holds them: without those of one session, and without secrets."""
    return redact({k: v for k, v in given.items() if k not in _NOT_SAVED})
