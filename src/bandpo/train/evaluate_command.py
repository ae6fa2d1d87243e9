"""`bandpo evaluate`: a run's model on the prompts that the run held out, or any model on prompts that are named."""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from bandpo._system.about import about
from bandpo._system.errors import exits_are_errors, printable
from bandpo._system.files import read_yaml, write_json
from bandpo.integrations.trl.generate import sampler_of
from bandpo.toy.tasks import TASKS
from bandpo.train.config import RunConfig
from bandpo.train.data import (
    held_out_prompts,
    is_file,
    load_prompts,
    load_task,
    load_tokenizer,
    window_of,
    with_readable_answers,
)
from bandpo.train.evaluate import evaluate
from bandpo.train.progress import Progress, quiet_hosts
from bandpo.train.rewards import CheckedReward, get_reward, unscored_line

_SETTINGS = "config.resolved.yaml"
_ASKED = (
    "task", "dataset", "dataset_config", "dataset_split", "prompt_column", "answer_column", "system_prompt", "reward",
    "bad_rows",
)  # fmt: skip


@dataclass(frozen=True)
class _Sampling:
    """The trainer's settings that an evaluation shares, as a run's config.resolved.yaml has them."""

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_completion_length: int | None = 1024
    per_device_eval_batch_size: int = 512
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict | None = None
    chat_template_kwargs: dict | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        for name in ("max_completion_length", "per_device_eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class _Job:
    """What is evaluated on what: the options, and what the model's run says where they say nothing."""

    model: str
    run: RunConfig
    sampling: _Sampling
    folder: Path | None
    """Folder of the run whose held-out prompts are used, None where the prompts were named."""
    reward: str


def evaluate_model(options: argparse.Namespace) -> dict[str, float]:
    """Sample a model on held-out prompts, print the summary and write it where asked.

    Args:
        options: The options of `bandpo evaluate`.
    """
    _check(options)
    job = _job(options)
    quiet_hosts()
    progress = Progress()
    local = Path(job.model).is_dir()  # its files may name others, which are not fetched for it
    code: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    tokenizer = load_tokenizer(job.model, local=local, **code)
    with exits_are_errors():
        reward = CheckedReward(
            get_reward(job.reward), job.reward, limit=job.run.reward_timeout, errors="skip", say=progress.say
        )
        try:
            model = AutoModelForCausalLM.from_pretrained(job.model, local_files_only=local, **code)
        except OSError as error:
            raise ValueError(f"cannot load {job.model}: {error}") from error
        if torch.cuda.is_available():
            model = model.to("cuda")
        rows = _rows(job, options, tokenizer, window_of(model.config), progress)
        samples = options.samples or job.run.eval_samples
        sampling = _sampling(job, options)
        length = sampling.max_completion_length or 1024
        temperature, top_p = sampling.temperature, sampling.top_p
        result = evaluate(
            model, tokenizer, rows, reward, samples=samples, max_new_tokens=length, temperature=temperature, top_p=top_p,
            seed=options.seed, batch_size=sampling.per_device_eval_batch_size, sampler=sampler_of(sampling),
        )  # fmt: skip
    summary = result.summary()
    data = job.run.task or (job.run.eval_dataset if job.folder and job.run.eval_dataset else job.run.dataset)
    progress.say(
        f"{job.model} on {len(rows)} prompts of {data}{f', held out by the run in {job.folder}' if job.folder else ''}"
        f"; reward {job.reward}; {samples} samples each at temperature {temperature:g}, top_p {top_p:g}"
        f"{''.join(f', {name} {value}' for name, value in sampler_of(sampling).items() if value not in (None, 0, 1.0, {}))}"
        f", up to {length} tokens"
    )
    for name, value in summary.items():
        progress.say(f"  {name:<20} {value:.4f}")
    if (line := unscored_line(reward)) is not None:
        progress.say(line)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "model": job.model, "prompts": len(rows), "data": data, "reward": job.reward, "samples": samples,
            "temperature": temperature, "top_p": top_p, "max_new_tokens": length, **sampler_of(sampling), **summary,
        }  # fmt: skip
        write_json(options.output, {**found, "about": about(seed=options.seed, options=_plain(options))})
    return summary


def _check(options: argparse.Namespace) -> None:
    if options.task is not None and options.dataset is not None:
        raise ValueError(f"--task {options.task} and --dataset {options.dataset} are both set; choose one")
    if options.task is not None and options.task not in TASKS:
        raise ValueError(f"--task {options.task}: choose one of {', '.join(TASKS)}")
    for name in ("prompts", "samples", "batch_size", "max_new_tokens"):
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
        if "task" in asked:
            job = _named(model, asked)
        else:
            own = {name: getattr(run, name) for name in ("prompt_column", "answer_column", "system_prompt", "bad_rows")}
            named = {"dataset": run.dataset, "dataset_config": run.dataset_config} if not other else {}
            own |= {"reward": run.reward} if run.task is None and ":" not in (run.reward or "") else {}
            job = _named(model, {**own, **named, **asked})
        return replace(job, sampling=sampling)
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
    return _Job(model, replace(run, **kept), sampling, folder, reward)


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
    run = RunConfig(model=model, **{"dataset_split": "test", **asked})
    return _Job(model, run, _Sampling(), None, run.reward or run.task or "")


def _run_folder(model: Path) -> Path | None:
    """The folder of the run that a model is of: the folder itself, or the one that its model/ or checkpoint is in."""
    if (model / _SETTINGS).is_file():
        return model
    if (model.name == "model" or model.name.startswith("checkpoint-")) and (model.parent / _SETTINGS).is_file():
        return model.parent
    return None


def _settings(folder: Path) -> tuple[RunConfig, _Sampling]:
    """What a run's folder says about it, each value of its type; no file or module that it names is touched."""
    path = folder / _SETTINGS
    found = read_yaml(path)
    kept: list[dict[str, Any]] = []
    for cls in (RunConfig, _Sampling):
        kept.append({})
        for name, kind in get_type_hints(cls).items():  # of a field: the parser of the command line changes its type
            if name not in found:
                continue
            value, types = found[name], get_args(kind) or (kind,)
            numbers = (*types, int) if float in types else types
            if not isinstance(value, numbers) or (isinstance(value, bool) and bool not in types):
                names = " or ".join("nothing" if t is type(None) else getattr(t, "__name__", str(t)) for t in types)
                raise ValueError(f"{path}: {name} is {printable(repr(value))[:60]}, and must be {names}")
            kept[-1][name] = value
    try:
        return RunConfig(**kept[0]), _Sampling(**kept[1])
    except ValueError as error:
        raise ValueError(f"{path}: {printable(str(error))}") from None


def _rows(job: _Job, options: argparse.Namespace, tokenizer: Any, window: int | None, progress: Progress) -> Dataset:
    """The prompts."""
    run = job.run
    if job.folder is not None and run.task is None:
        rows = held_out_prompts(
            run,
            tokenizer,
            window,
            completion=job.sampling.max_completion_length or 1024,
            seed=job.sampling.seed,
            say=progress.say,
        )
        return rows.select(range(min(options.prompts or len(rows), len(rows))))
    count = options.prompts or run.eval_prompts
    if run.task is not None:
        return load_task(run.task, count)[1]
    assert run.dataset is not None
    bad: dict[str, Any] = {"skip_bad": run.bad_rows == "skip", "say": progress.say}
    rows = load_prompts(
        run.dataset, config=run.dataset_config, split=run.dataset_split, prompt_column=run.prompt_column,
        answer_column=run.answer_column, system_prompt=run.system_prompt, chat=tokenizer.chat_template is not None, **bad,
    )  # fmt: skip
    rows = rows.select(range(min(count, len(rows))))
    return with_readable_answers(rows, run.dataset, **bad) if job.reward == "math" else rows


def _sampling(job: _Job, options: argparse.Namespace) -> _Sampling:
    """How to sample: as the options say, else as the run evaluated itself, else as it trained."""
    length = job.sampling.max_completion_length
    if job.folder is None and job.run.task is not None:
        length = TASKS[job.run.task].max_completion_length
    asked = {
        "temperature": job.run.eval_temperature if options.temperature is None else options.temperature,
        "top_p": options.top_p, "per_device_eval_batch_size": options.batch_size,
        "max_completion_length": options.max_new_tokens or length,
    }  # fmt: skip
    return replace(job.sampling, **{name: value for name, value in asked.items() if value is not None})


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    """Options as JSON."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("run", "command")}
