"""What `bandpo evaluate` was asked for, from its options and the settings of a run; needs no torch to find a mistake."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args, get_type_hints

from bandpo._system.errors import printable
from bandpo._system.files import read_yaml
from bandpo.toy.tasks import TASKS
from bandpo.train.config import DEFAULT_LENGTH, RunConfig
from bandpo.train.names import missing_folder

if TYPE_CHECKING:
    from bandpo.train.evaluate_results import Result

_SETTINGS = "config.resolved.yaml"
"""The file in the folder of a run that holds all of its settings."""
FIGURES = (".png", ".svg", ".pdf", ".html")
"""How the file of `--plot` may end."""
_ASKED = (
    *("task", "shots", "dataset", "dataset_config", "dataset_split", "prompt_column", "answer_column", "system_prompt"),
    *("reward", "reward_workers", "bad_rows"),
)
"""Options of the command that are fields of `RunConfig`."""


@dataclass(frozen=True)
class Sampling:
    """The trainer's settings that an evaluation shares; the names are those of config.resolved.yaml.

    Args:
        seed: Seed of the run, which chose its held-out prompts.
        temperature: Sampling temperature, 0 is greedy.
        top_p: Probability mass that is sampled from.
        max_completion_length: Tokens of the longest completion; None for `DEFAULT_LENGTH`.
        per_device_eval_batch_size: Completions sampled at once.
        top_k: Number of the most likely tokens that are sampled from, 0 for all.
        min_p: Smallest probability in sampling, relative to the largest one; None for no limit.
        repetition_penalty: transformers' penalty on tokens that were there before, 1 for none.
        generation_kwargs: Further options of transformers' `GenerationConfig`.
        chat_template_kwargs: Further arguments of the chat template.
        bf16: Whether the run computed in bfloat16; None where there is no run.

    Raises:
        ValueError: If a value is out of range.
    """

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
    bf16: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        for name in ("max_completion_length", "per_device_eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or a number of tokens, got {self.top_k}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be a positive number, 1 for none; got {self.repetition_penalty}")

    @property
    def length(self) -> int:
        """The number of tokens of the longest completion."""
        return self.max_completion_length or DEFAULT_LENGTH


@dataclass(frozen=True)
class Job:
    """What is evaluated on what: the options of the command, and the settings of the run for what they leave open.

    Args:
        model: Folder or Hub name of the model.
        run: bandpo's settings: task or dataset, columns, reward.
        sampling: How the run sampled in training; for a named task or dataset the defaults.
        folder: Folder of the run whose held-out prompts are used, None where the prompts were named.
        reward: Name of the reward; of a run with several, the first one.
        own: Folder of the run that the model belongs to, None for a model of no run.
    """

    model: str
    run: RunConfig
    sampling: Sampling
    folder: Path | None
    reward: str
    own: Path | None = None

    @property
    def data(self) -> str | None:
        """The name of the task or dataset."""
        held_out = self.run.eval_dataset if self.folder else None
        return self.run.task or held_out or self.run.dataset

    @property
    def prompts(self) -> str:
        """Which prompts of the data are used, in a few words."""
        if self.folder is None or self.run.task is not None:
            return str(self.data)
        drawn = "" if self.run.eval_dataset else f" with seed {self.sampling.seed}"
        return f"{self.data}, held out{drawn}"


class Asked(NamedTuple):
    """One of the models that `bandpo evaluate` was asked for.

    Args:
        name: The model, or the file of a result, as it was named.
        told: What must be the same for all of the models, by its name.
        job: What is evaluated on what; None for a file, whose model is not sampled again.
        sampling: How to sample: as the options say, else as the run evaluated itself, else as it trained.
        saved: What the file holds.
    """

    name: str
    told: Mapping[str, object]
    job: Job | None = None
    sampling: Sampling | None = None
    saved: "Result | None" = None


def asked_jobs(options: argparse.Namespace) -> list[Asked]:
    """What to evaluate on what, and how to sample; folders of runs and results are read, and no model is loaded.

    A model of no run is scored as the first run among the models, where there is one.

    Args:
        options: The options of `bandpo evaluate`.

    Returns:
        The models, in the order in which they were named.

    Raises:
        ValueError: If an option is out of range, options contradict each other, something is not named, or the models would not
            be scored alike.
    """
    _check(options)
    names: list[str] = options.models
    for i, name in enumerate(names):
        if (twin := next((n for n in names[:i] if _place(n) == _place(name)), None)) is not None:
            raise ValueError(f"{name} is the same model as {twin}; name each model once")
    saved = {name: _saved(name) for name in names if name.endswith(".json") and Path(name).is_file()}
    if len(saved) == len(names):
        _refuse_ignored(options)
    jobs = _jobs([name for name in names if name not in saved], options)
    asked: list[Asked] = []
    for name in names:
        if name in saved:
            asked.append(Asked(name, saved[name].alike, saved=saved[name]))
        else:
            sampling = _sampling(jobs[name], options)
            asked.append(Asked(name, _told(jobs[name], sampling, options), jobs[name], sampling))
    check_alike(names, [one.told for one in asked], fixed=len(saved) == len(names))
    return asked


def _jobs(names: Sequence[str], options: argparse.Namespace) -> dict[str, Job]:
    """The job of each model that is sampled."""
    runs = [name for name in names if _run_folder(Path(name)) is not None]
    if options.as_run is not None:
        if _run_folder(Path(options.as_run)) is None:
            raise ValueError(f"--as {options.as_run}: there is no run of bandpo (with {_SETTINGS})")
        common = _job(options.as_run, options)
        jobs = {name: replace(common, model=_path_of(name), own=_run_folder(Path(name))) for name in names}
    elif runs:
        common = _job(runs[0], options)
        jobs = {name: _job(name, options) if name in runs else replace(common, model=name, own=None) for name in names}
    else:
        jobs = {name: _job(name, options) for name in names}
    for job in jobs.values():
        _check_there(job.model)
    return jobs


def _saved(name: str) -> "Result":
    from bandpo.train.evaluate_results import Result  # torch

    return Result.read(Path(name))


def _refuse_ignored(options: argparse.Namespace) -> None:
    """Refuse options about sampling where only files of results are named."""
    kept = {"models", "output", "plot", "seed", "command"}
    ignored = [name for name, value in vars(options).items() if name not in kept and value not in (None, False)]
    if ignored:
        name = "as" if ignored[0] == "as_run" else ignored[0].replace("_", "-")
        raise ValueError(f"--{name} would be ignored: only files of results are named, and nothing is sampled")


_FIXES = {
    "prompts": "--task NAME, or --dataset FILE with --reward NAME",
    "split": "--dataset-split NAME",
    "configuration of the dataset": "--dataset-config NAME",
    "number of prompts": "--prompts N",
    "system prompt": "--system-prompt TEXT",
    "shots": "--shots N",
    "reward": "--reward NAME",
    "samples": "--samples N",
    "temperature": "--temperature T",
    "top_p": "--top-p P",
    "max_new_tokens": "--max-new-tokens N",
    "top_k": "--top-k N",
    "min_p": "--min-p P",
    "repetition_penalty": "--repetition-penalty P",
    "generation_kwargs": None,
    "chat_template_kwargs": None,
}
"""What models that are compared must have in common, and the option that gives it to all of them."""


def _told(job: Job, sampling: Sampling, options: argparse.Namespace) -> dict[str, object]:
    """What decides how a model is scored, under the names of `_FIXES`."""
    run = job.run
    held_out = job.folder is not None and run.eval_dataset is not None
    data: dict[str, object] = {
        "split": run.eval_dataset_split if held_out else run.dataset_split,
        "configuration of the dataset": run.dataset_config,
        "system prompt": run.system_prompt,
    }
    told = {name: getattr(sampling, name) for name in _FIXES if hasattr(sampling, name)}
    return {
        "prompts": job.prompts,
        **({} if run.task is not None else data),
        "number of prompts": options.prompts or run.eval_prompts,
        "shots": run.shots,
        "reward": job.reward,
        "samples": options.samples or run.eval_samples,
        **told,
        "max_new_tokens": sampling.length,
    }


def check_alike(names: Sequence[str], told: Sequence[Mapping[str, object]], *, fixed: bool = False) -> None:
    """Check that models are scored alike: on the same prompts, with the same reward and sampler.

    Args:
        names: The models as they were named.
        told: What decides how each of them is scored, by its name.
        fixed: Whether all of them have been scored, so that only others can be named.

    Raises:
        ValueError: If they are not; the message has the values, and the options that give one value to all.
    """
    for name, other in zip(names[1:], told[1:], strict=True):
        differ = [key for key in _FIXES if other.get(key) != told[0].get(key)]
        if differ:
            values = ", ".join(f"{key}: {_shown(told[0].get(key))} and {_shown(other.get(key))}" for key in differ)
            if fixed:
                raise ValueError(f"{printable(names[0])} and {printable(name)} were scored differently ({values})")
            fixes = [fix for key in differ if (fix := _FIXES[key]) is not None]
            each = f"give one value to all with {'; '.join(fixes)}; or " if fixes else ""
            raise ValueError(
                f"{printable(names[0])} and {printable(name)} would be scored differently ({values}): {each}score all as one "
                "run, on its prompts, with --as RUN"
            )


def _shown(value: object) -> str:
    text = printable(value if isinstance(value, str) else repr(value))
    return f"{text[:60]}..." if len(text) > 63 else text


def _path_of(name: str) -> str:
    """What is loaded for the name of a model: of a run its folder model/."""
    folder = _run_folder(Path(name))
    return str(folder / "model") if folder is not None and folder == Path(name) else name


def _place(name: str) -> str:
    """What two names of one model have in common."""
    path = Path(_path_of(name))
    return str(path.resolve()) if path.exists() else name


def _check_there(model: str) -> None:
    """Check that the folder of a model exists, where the name can only be that of a folder.

    Raises:
        ValueError: If it does not.
    """
    if (missing := missing_folder(model)) is not None:
        raise ValueError(missing)


def _check(options: argparse.Namespace) -> None:
    if options.task is not None and options.dataset is not None:
        raise ValueError(f"--task {options.task} and --dataset {options.dataset} are both set; choose one")
    if options.task is not None and options.task not in TASKS:
        raise ValueError(f"--task {options.task}: choose one of {', '.join(TASKS)}")
    for name in ("prompts", "samples", "batch_size", "max_new_tokens", "reward_workers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.plot is not None and options.plot.suffix not in FIGURES:
        raise ValueError(f"--plot {options.plot}: the figure must end in {', '.join(FIGURES[:-1])} or {FIGURES[-1]}")


def _job(model: str, options: argparse.Namespace) -> Job:
    asked = {name: getattr(options, name) for name in _ASKED if getattr(options, name) is not None}
    folder = _run_folder(Path(model))
    if folder is None:
        return _named(model, asked)
    path = _path_of(model)
    run, sampling = _settings(folder)
    data = run.task or run.eval_dataset or run.dataset
    other = asked.get("task") not in (None, data) or asked.get("dataset") not in (None, data)
    if other or "dataset_split" in asked or "dataset_config" in asked:
        named = _named(path, asked if "task" in asked else _completed(asked, run, other=other))
        return replace(named, sampling=sampling, own=folder)
    return replace(_on_held_out(path, asked, run, sampling, folder), own=folder)


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
    if run.task is None and ":" not in run.rewards[0]:
        own |= {"reward": run.rewards[0]}
    return {**own, **asked}


def _on_held_out(model: str, asked: dict[str, Any], run: RunConfig, sampling: Sampling, folder: Path) -> Job:
    """A model of a run on the prompts that the run held out; no code or dataset is loaded because a file names it."""
    data = run.task or run.eval_dataset or run.dataset
    reward = asked.get("reward") or run.rewards[0]
    if "reward" not in asked and ":" in reward:
        raise ValueError(
            f"the run in {folder} was scored by code that its configuration names, and that is imported only when you name it "
            f"too: repeat it with --reward {printable(reward)}"
        )
    from bandpo.train.data import is_file  # datasets and transformers, where the run has a dataset

    if run.task is None and "dataset" not in asked and not is_file(data or ""):
        raise ValueError(
            f"the run in {folder} names the dataset {printable(str(data))!r}, which is no file here, and nothing is fetched "
            f"because a file names it: repeat it with --dataset {printable(str(data))}"
        )
    kept = {k: v for k, v in asked.items() if k not in ("task", "dataset")}
    # The run's number of processes was for its machine, and for its own reward.
    return Job(model, replace(run, **{"reward_workers": None, **kept}), sampling, folder, reward)


def _named(model: str, asked: dict[str, Any]) -> Job:
    """A model on a task or dataset that the options name."""
    if "task" not in asked and "dataset" not in asked:
        _check_there(model)
        raise ValueError(
            f"{model} is in no folder of a run of bandpo (with {_SETTINGS}), which would say what to score it on: name a task "
            "with --task, or prompts with --dataset and --reward"
        )
    if "task" not in asked and "reward" not in asked:
        raise ValueError("--dataset needs --reward: math, math-lenient or package.module:NAME")
    settings: dict[str, Any] = {"dataset_split": "test", **asked}
    run = RunConfig(model=model, **settings)
    return Job(model, run, Sampling(), None, run.rewards[0])


def _run_folder(model: Path) -> Path | None:
    """The folder of the run that a model belongs to: the folder itself, or the parent of its model/ or checkpoint."""
    if (model / _SETTINGS).is_file():
        return model
    if (model.name == "model" or model.name.startswith("checkpoint-")) and (model.parent / _SETTINGS).is_file():
        return model.parent
    return None


def _settings(folder: Path) -> tuple[RunConfig, Sampling]:
    """The settings of a run from its folder, each checked for its type; no file or module that they name is touched."""
    path = folder / _SETTINGS
    found = read_yaml(path)
    for_run, for_sampling = (_typed(found, cls, path) for cls in (RunConfig, Sampling))
    try:
        return RunConfig(**for_run), Sampling(**for_sampling)
    except ValueError as error:
        raise ValueError(f"{path}: {printable(str(error))}") from None


def _typed(found: dict[str, Any], cls: type, path: Path) -> dict[str, Any]:
    """The values for the fields of a dataclass, each of the type that the field declares."""
    kept: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():  # not from `fields`: the command line's parser changes their types
        if name not in found:
            continue
        value, types = found[name], cast("tuple[type, ...]", get_args(kind) or (kind,))
        if name == "reward" and isinstance(value, str):  # a file may give one name without a list
            value = [value]
        types = tuple(getattr(t, "__origin__", t) for t in types)  # dict[str, Any] as dict
        numbers = (*types, int) if float in types else types
        if not isinstance(value, numbers) or (isinstance(value, bool) and bool not in types):
            names = " or ".join("nothing" if t is type(None) else getattr(t, "__name__", str(t)) for t in types)
            raise ValueError(f"{path}: {name} is {printable(repr(value))[:60]}, and must be {names}")
        kept[name] = value
    return kept


def _sampling(job: Job, options: argparse.Namespace) -> Sampling:
    """How to sample: as the options say, else as the run evaluated itself, else as it trained."""
    length = job.sampling.max_completion_length
    if job.folder is None and job.run.task is not None:
        length = TASKS[job.run.task].max_completion_length
    asked = {
        "temperature": job.run.eval_temperature if options.temperature is None else options.temperature,
        **{name: getattr(options, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")},
        "per_device_eval_batch_size": options.batch_size,
        "max_completion_length": options.max_new_tokens or length,
    }
    return replace(job.sampling, **{name: value for name, value in asked.items() if value is not None})
