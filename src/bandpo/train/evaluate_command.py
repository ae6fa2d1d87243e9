"""`bandpo evaluate`: the model of a run on the prompts that the run held out, or any model on named prompts."""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from bandpo._system.about import about, plain
from bandpo._system.errors import exits_are_errors, printable
from bandpo._system.files import read_yaml, write_json
from bandpo._system.progress import Progress, quiet_hosts
from bandpo.integrations.trl.generate import sampler_of
from bandpo.toy.tasks import TASKS
from bandpo.train.config import RunConfig
from bandpo.train.data import checked_prompts, held_out_prompts, is_file, load_task, load_tokenizer, window_of
from bandpo.train.evaluate import DEFAULT_LENGTH, Evaluation, evaluate
from bandpo.train.rewards import CheckedReward, get_reward, unscored_line

_SETTINGS = "config.resolved.yaml"
"""The file in the folder of a run that holds all of its settings."""
_ASKED = (
    *("task", "dataset", "dataset_config", "dataset_split", "prompt_column", "answer_column", "system_prompt"),
    *("reward", "reward_workers", "bad_rows"),
)
"""Options of the command that are fields of `RunConfig`."""


@dataclass(frozen=True)
class _Sampling:
    """The trainer's settings that an evaluation shares; the names are those of config.resolved.yaml."""

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_completion_length: int | None = DEFAULT_LENGTH
    per_device_eval_batch_size: int = 512
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        for name in ("max_completion_length", "per_device_eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def length(self) -> int:
        """The number of tokens of the longest completion."""
        return self.max_completion_length or DEFAULT_LENGTH


@dataclass(frozen=True)
class _Job:
    """What is evaluated on what: the options of the command, and the settings of the run for what they leave open."""

    model: str
    run: RunConfig
    sampling: _Sampling
    """How the run sampled in training; for a named task or dataset the defaults."""
    folder: Path | None
    """Folder of the run whose held-out prompts are used, None where the prompts were named."""
    reward: str

    @property
    def data(self) -> str | None:
        """The name of the task or dataset."""
        held_out = self.run.eval_dataset if self.folder else None
        return self.run.task or held_out or self.run.dataset


def evaluate_model(options: argparse.Namespace) -> dict[str, float]:
    """Sample a model on held-out prompts and score the samples, print the summary, and write it if a file is named.

    Args:
        options: The options of `bandpo evaluate`.

    Returns:
        Summary of the evaluation, as in `Evaluation.summary`.
    """
    _check(options)
    job = _job(options)
    sampling = _sampling(job, options)
    quiet_hosts()
    progress = Progress()
    local = Path(job.model).is_dir()  # its files may name others, which are not downloaded for it
    tokenizer = load_tokenizer(job.model, local=local, trust_remote_code=options.trust_remote_code)
    with exits_are_errors():
        reward = CheckedReward(
            get_reward(job.reward, workers=job.run.reward_workers),
            job.reward,
            limit=job.run.reward_timeout,
            errors="skip",
            say=progress.say,
        )
        model = _load_model(job.model, local=local, trust_remote_code=options.trust_remote_code)
        rows = _prompts(job, options.prompts, tokenizer, window_of(model.config), progress)
        result = evaluate(
            model,
            tokenizer,
            rows,
            reward,
            samples=options.samples or job.run.eval_samples,
            max_new_tokens=sampling.length,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=options.seed,
            batch_size=sampling.per_device_eval_batch_size,
            sampler=sampler_of(sampling),
        )
    summary = result.summary()
    _print(job, sampling, result, progress)
    if (line := unscored_line(reward)) is not None:
        progress.say(line)
    if options.output is not None:
        _write(job, sampling, result, options)
    return summary


def _load_model(name: str, *, local: bool, trust_remote_code: bool) -> Any:
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, local_files_only=local, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise ValueError(f"cannot load {name}: {error}") from error
    return model.to("cuda") if torch.cuda.is_available() else model


def _print(job: _Job, sampling: _Sampling, result: Evaluation, progress: Progress) -> None:
    """Print what was evaluated and how, and the summary."""
    further = [f", {name} {value}" for name, value in sampler_of(sampling).items() if value not in (None, 0, 1.0, {})]
    progress.say(
        f"{job.model} on {len(result.prompts)} prompts of {job.data}"
        f"{f', held out by the run in {job.folder}' if job.folder else ''}"
        f"; reward {job.reward}; {result.samples} samples each at temperature {sampling.temperature:g}, "
        f"top_p {sampling.top_p:g}{''.join(further)}, up to {sampling.length} tokens"
    )
    for name, value in result.summary().items():
        progress.say(f"  {name:<20} {value:.4f}")


def _write(job: _Job, sampling: _Sampling, result: Evaluation, options: argparse.Namespace) -> None:
    """Write the summary, how it was made, and the environment as JSON."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in vars(options).items() if name != "command"}
    found = {
        "model": job.model,
        "prompts": len(result.prompts),
        "data": job.data,
        "reward": job.reward,
        "samples": result.samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.length,
        **sampler_of(sampling),
        **result.summary(),
        "about": about(seed=options.seed, options=plain(given)),
    }
    write_json(options.output, found)


def _check(options: argparse.Namespace) -> None:
    if options.task is not None and options.dataset is not None:
        raise ValueError(f"--task {options.task} and --dataset {options.dataset} are both set; choose one")
    if options.task is not None and options.task not in TASKS:
        raise ValueError(f"--task {options.task}: choose one of {', '.join(TASKS)}")
    for name in ("prompts", "samples", "batch_size", "max_new_tokens", "reward_workers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")


def _job(options: argparse.Namespace) -> _Job:
    asked = {name: getattr(options, name) for name in _ASKED if getattr(options, name) is not None}
    folder = _run_folder(Path(options.model))
    if folder is None:
        return _named(options.model, asked)
    model = str(folder / "model") if folder == Path(options.model) else options.model
    run, sampling = _settings(folder)
    data = run.task or run.eval_dataset or run.dataset
    other = asked.get("task") not in (None, data) or asked.get("dataset") not in (None, data)
    if other or "dataset_split" in asked or "dataset_config" in asked:
        return replace(
            _named(model, asked if "task" in asked else _completed(asked, run, other=other)), sampling=sampling
        )
    return _on_held_out(model, asked, run, sampling, folder)


def _completed(asked: dict[str, Any], run: RunConfig, *, other: bool) -> dict[str, Any]:
    """What the options name, completed by the settings of the run.

    Args:
        asked: The options that were given.
        run: Configuration of the run.
        other: Whether the options name another dataset than the run's.
    """
    own = {name: getattr(run, name) for name in ("prompt_column", "answer_column", "system_prompt", "bad_rows")}
    if not other:
        own |= {"dataset": run.dataset, "dataset_config": run.dataset_config}
    if run.task is None and ":" not in (run.reward or ""):
        own |= {"reward": run.reward}
    return {**own, **asked}


def _on_held_out(model: str, asked: dict[str, Any], run: RunConfig, sampling: _Sampling, folder: Path) -> _Job:
    """A model of a run on the prompts that the run held out; no code or dataset is loaded because a file names it."""
    data = run.task or run.eval_dataset or run.dataset
    reward = asked.get("reward") or run.reward or run.task or ""
    if "reward" not in asked and ":" in reward:
        raise ValueError(
            f"the run in {folder} was scored by code that its configuration names, and that is imported only when you name it "
            f"too: repeat it with --reward {printable(reward)}"
        )
    if run.task is None and "dataset" not in asked and not is_file(data or ""):
        raise ValueError(
            f"the run in {folder} names the dataset {printable(str(data))!r}, which is no file here, and nothing is fetched "
            f"because a file names it: repeat it with --dataset {printable(str(data))}"
        )
    kept = {k: v for k, v in asked.items() if k not in ("task", "dataset")}
    # The run's number of processes was for its machine, and for its own reward.
    return _Job(model, replace(run, **{"reward_workers": None, **kept}), sampling, folder, reward)


def _named(model: str, asked: dict[str, Any]) -> _Job:
    """A model on a task or dataset that the options name."""
    if "task" not in asked and "dataset" not in asked:
        if Path(model).is_absolute() and not Path(model).exists():
            raise ValueError(f"cannot load {model}: there is no such folder")
        raise ValueError(
            f"{model} is in no folder of a run of bandpo (with {_SETTINGS}), which would say what to score it on: name a task "
            "with --task, or prompts with --dataset and --reward"
        )
    if "task" not in asked and "reward" not in asked:
        raise ValueError("--dataset needs --reward: math or package.module:NAME")
    settings: dict[str, Any] = {"dataset_split": "test", **asked}
    run = RunConfig(model=model, **settings)
    return _Job(model, run, _Sampling(), None, run.reward or run.task or "")


def _run_folder(model: Path) -> Path | None:
    """The folder of the run that a model belongs to: the folder itself, or the parent of its model/ or checkpoint."""
    if (model / _SETTINGS).is_file():
        return model
    if (model.name == "model" or model.name.startswith("checkpoint-")) and (model.parent / _SETTINGS).is_file():
        return model.parent
    return None


def _settings(folder: Path) -> tuple[RunConfig, _Sampling]:
    """The settings of a run from its folder, each checked for its type; no file or module that they name is touched."""
    path = folder / _SETTINGS
    found = read_yaml(path)
    for_run, for_sampling = (_typed(found, cls, path) for cls in (RunConfig, _Sampling))
    try:
        return RunConfig(**for_run), _Sampling(**for_sampling)
    except ValueError as error:
        raise ValueError(f"{path}: {printable(str(error))}") from None


def _typed(found: dict[str, Any], cls: type, path: Path) -> dict[str, Any]:
    """The values for the fields of a dataclass, each of the type that the field declares."""
    kept: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():  # not from `fields`: the command line's parser changes their types
        if name not in found:
            continue
        value, types = found[name], cast("tuple[type, ...]", get_args(kind) or (kind,))
        types = tuple(getattr(t, "__origin__", t) for t in types)  # dict[str, Any] as dict
        numbers = (*types, int) if float in types else types
        if not isinstance(value, numbers) or (isinstance(value, bool) and bool not in types):
            names = " or ".join("nothing" if t is type(None) else getattr(t, "__name__", str(t)) for t in types)
            raise ValueError(f"{path}: {name} is {printable(repr(value))[:60]}, and must be {names}")
        kept[name] = value
    return kept


def _prompts(job: _Job, asked: int | None, tokenizer: Any, window: int | None, progress: Progress) -> Dataset:
    """The prompts of the evaluation, at most `asked` or as many as the run held out."""
    run = job.run
    if job.folder is not None and run.task is None:
        rows = held_out_prompts(
            run, tokenizer, window, completion=job.sampling.length, seed=job.sampling.seed, say=progress.say
        )
        return rows.select(range(min(asked or len(rows), len(rows))))
    count = asked or run.eval_prompts
    if run.task is not None:
        return load_task(run.task, count)[1]
    assert run.dataset is not None
    return checked_prompts(run, run.dataset, run.dataset_split, tokenizer, say=progress.say, first=count)


def _sampling(job: _Job, options: argparse.Namespace) -> _Sampling:
    """How to sample: as the options say, else as the run evaluated itself, else as it trained."""
    length = job.sampling.max_completion_length
    if job.folder is None and job.run.task is not None:
        length = TASKS[job.run.task].max_completion_length
    asked = {
        "temperature": job.run.eval_temperature if options.temperature is None else options.temperature,
        "top_p": options.top_p,
        "per_device_eval_batch_size": options.batch_size,
        "max_completion_length": options.max_new_tokens or length,
    }
    return replace(job.sampling, **{name: value for name, value in asked.items() if value is not None})
