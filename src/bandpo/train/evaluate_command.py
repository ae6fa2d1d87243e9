"""`bandpo evaluate`: models of runs on the prompts that the runs held out, or any models on named prompts."""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from bandpo._system.bounded import parse_json, read_regular
from bandpo._system.errors import exits_are_errors, printable
from bandpo._system.progress import Progress, quiet_hosts
from bandpo._system.secrets import redact_text
from bandpo.integrations.trl.generate import sampler_of
from bandpo.train.compute import Compute, choose, count_parameters, this_machine
from bandpo.train.config import MATH
from bandpo.train.data import checked_prompts, checked_shots, held_out_prompts, load_task, load_tokenizer, window_of
from bandpo.train.evaluate import Evaluation, evaluate
from bandpo.train.evaluate_files import write_beside, write_results
from bandpo.train.evaluate_options import Asked, Job, Sampling
from bandpo.train.evaluate_results import Result, digest
from bandpo.train.evaluate_tables import lines_of, notes, scored_on, table
from bandpo.train.models import loadable
from bandpo.train.progress import counting
from bandpo.train.rewards import CheckedReward, get_reward, unscored_line
from bandpo.train.votes import merged, voter_of


@dataclass(frozen=True)
class _Ready:
    """A model that can be sampled: all that is checked before the first one is."""

    name: str
    alike: Mapping[str, object]
    job: Job
    sampling: Sampling
    loadable: str
    """Folder or Hub name for transformers."""
    tokenizer: Any
    compute: Compute
    rows: Dataset
    reward: CheckedReward
    prompts: list[str]
    """Digests of the prompts."""

    @property
    def local(self) -> bool:
        """Whether it is a folder, whose files may name others, which are not downloaded for it."""
        return Path(self.loadable).is_dir()


def evaluate_models(asked: Sequence[Asked], options: argparse.Namespace) -> dict[str, Result]:
    """Sample models on the same prompts and score the samples, print the results, and write them.

    Args:
        asked: The models; results that were read from files are compared as they are.
        options: The options of `bandpo evaluate`.

    Returns:
        The result of each model by its name.
    """
    quiet_hosts()
    is_main = PartialState().is_main_process
    progress = Progress(main=is_main)
    with exits_are_errors():
        ready = {one.name: _prepared(one, options, progress) for one in asked if one.saved is None}
        _check_prompts({one.name: one.saved or ready[one.name] for one in asked})
        if options.plot is not None and is_main:
            options.plot.parent.mkdir(parents=True, exist_ok=True)
        for line in dict.fromkeys(one.compute.line for one in ready.values()):
            if line is not None:
                progress.say(line)
        results: dict[str, Result] = {}
        for one in asked:
            results[one.name] = one.saved or _sampled(ready[one.name], options, progress, several=len(asked) > 1)
            if one.job is not None and one.job.own is not None and is_main:
                write_beside(results[one.name], one.job.own, options, progress)
    results = _named(asked, results)
    if len(results) > 1:
        progress.say(f"{len(results)} models{scored_on(next(iter(results.values())), several=True)}")
        for line in table(results):
            progress.say(line)
    for line in notes(list(results.values())):
        progress.say(f"  {line}")
    if options.output is None:
        for one in (one for one in ready.values() if one.job.own is None):
            progress.say(f"the result of {one.name}, a model of no run, is not written; --output FILE writes it")
    if is_main:
        write_results(results, options, progress)
    return results


def _named(asked: Sequence[Asked], results: Mapping[str, Result]) -> dict[str, Result]:
    """The results by the names of their models: of a file that of the model in it, unless two would have the same name."""
    models = [str(one.saved.settings["model"]) if one.saved else one.name for one in asked]
    return {m if models.count(m) == 1 else one.name: results[one.name] for m, one in zip(models, asked, strict=True)}


def _prepared(one: Asked, options: argparse.Namespace, progress: Progress) -> _Ready:
    """A model whose parts were found and checked, except that its weights are not loaded."""
    job, sampling = one.job, one.sampling
    assert job is not None and sampling is not None
    name = loadable(job.model, progress.say)
    local = Path(name).is_dir()
    tokenizer = load_tokenizer(name, local=local, trust_remote_code=options.trust_remote_code)
    reward = CheckedReward(
        get_reward(job.reward, workers=job.run.reward_workers),
        job.reward,
        limit=job.run.reward_timeout,
        errors="skip",
        say=progress.say,
    )
    compute = _compute(job, name, options, local=local)
    _check_base(Path(name), job.run.model if job.own is not None and job.own == job.folder else None)
    config = _config(name, local=local, trust_remote_code=options.trust_remote_code)
    _check_weights(Path(name))
    rows = _prompts(job, options.prompts, tokenizer, window_of(config), progress)
    both = zip(cast("list[Any]", rows["prompt"]), cast("list[Any]", rows["answer"]), strict=True)
    digests = [digest(prompt, answer) for prompt, answer in both]
    return _Ready(one.name, one.told, job, sampling, name, tokenizer, compute, rows, reward, digests)


def _check_prompts(models: Mapping[str, _Ready | Result]) -> None:
    """Check that all models are scored on the same prompts, in the same order.

    Raises:
        ValueError: If they are not.
    """
    (first, reference), *others = models.items()
    for name, other in others:
        if list(other.prompts) != list(reference.prompts):
            shared = len(set(reference.prompts) & set(other.prompts))
            raise ValueError(
                f"{printable(first)} and {printable(name)} would be scored on different prompts: {shared} of "
                f"{len(reference.prompts)} and {len(other.prompts)} are the same. Score all as one run, on its prompts, with "
                "--as RUN, or name other prompts with --dataset FILE and --reward NAME"
            )


def _sampled(one: _Ready, options: argparse.Namespace, progress: Progress, *, several: bool) -> Result:
    """Load a model, sample it, score the samples, and print what came out; its memory is free again."""
    job, sampling = one.job, one.sampling
    started = time.monotonic()
    model = _load_model(one.loadable, one.compute, local=one.local, trust_remote_code=options.trust_remote_code)
    samples = options.samples or job.run.eval_samples
    with progress.stage(f"sampling {job.model}", len(one.rows) * samples, "completions") as advance:
        found = evaluate(
            model,
            one.tokenizer,
            one.rows,
            counting(one.reward, advance),
            samples=samples,
            max_new_tokens=sampling.length,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=options.seed,
            batch_size=sampling.per_device_eval_batch_size,
            sampler=sampler_of(sampling),
            autocast=torch.bfloat16 if one.compute.bf16 else None,
            voter=voter_of(job.reward, one.reward.function),
        )
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if job.reward in MATH and found.answers is not None:
        found = replace(found, answers=merged(found.answers, found.rewards, workers=job.run.reward_workers))
    result = Result(_settings(one, found, options), found.summary(), one.alike, found.tallies(), one.prompts)
    if several:
        mean = result.measures[f"mean@{found.samples}"]
        progress.say(f"{job.model}: mean@{found.samples} {mean} in {time.monotonic() - started:.0f} s")
    else:
        progress.say(f"{job.model}{scored_on(result)}")
        for line in lines_of(result):
            progress.say(line)
    if (line := unscored_line(one.reward)) is not None:
        progress.say(line)
    return result


def _settings(one: _Ready, found: Evaluation, options: argparse.Namespace) -> dict[str, Any]:
    """What was evaluated and how, for the file."""
    job, sampling = one.job, one.sampling
    return {
        "model": job.model,
        "prompts": len(found.prompts),
        "data": str(job.data),
        "reward": job.reward,
        "samples": found.samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.length,
        **sampler_of(sampling),
        "seed": options.seed,
        "computed_in": "bfloat16" if one.compute.bf16 else "float32",
        "held_out_by": None if job.folder is None else str(job.folder),
    }


def _compute(job: Job, model_name: str, options: argparse.Namespace, *, local: bool) -> Compute:
    """Device and precision: as the options say, else the precision of the run where the machine has it, else chosen."""
    machine = this_machine()
    on_cpu = bool(options.use_cpu) or machine.accelerator is None
    has_bf16 = machine.cpu_bf16 is not None if on_cpu else machine.bf16
    ran = job.sampling.bf16 if job.folder is not None else None
    bf16 = options.bf16 if options.bf16 is not None or ran is None or (ran and not has_bf16) else ran
    return choose(
        {"use_cpu": options.use_cpu, "bf16": bf16},
        lambda: count_parameters(model_name, local=local),
        machine,
        as_set="as set" if options.bf16 is not None else "as the run",
        override="--use-cpu, --bf16",
    )


def _check_base(folder: Path, trained_from: str | None) -> None:
    """Check that the model of an adapter of LoRA is there, if its file names it as a folder; nothing is fetched for a file.

    Args:
        folder: Folder of the adapter, or of a whole model.
        trained_from: The model that the run of the adapter names.

    Raises:
        ValueError: If it is not there.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    settings = parse_json(read_regular(file), str(file))
    base = cast("dict[str, object]", settings).get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str) or not Path(base).is_absolute() or Path(base).is_dir():
        return
    named = f", made from {printable(redact_text(trained_from))}" if trained_from else ""
    raise ValueError(
        f"{folder} is an adapter of LoRA for the model in {printable(base)}{named}, and there is no such folder here. Make it "
        f"again, for example with `bandpo evaluate` of that model, and write its folder into base_model_name_or_path of {file}"
    )


def _load_model(name: str, compute: Compute, *, local: bool, trust_remote_code: bool) -> Any:
    """A model on its device; its weights are in float32 unless it computes in bfloat16 and was saved so."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            name,
            local_files_only=local,
            trust_remote_code=trust_remote_code,
            dtype="auto" if compute.bf16 else torch.float32,
        )
    except OSError as error:
        raise ValueError(f"cannot load {name}: {error}") from error
    return model.to(compute.device)


def _config(name: str, *, local: bool, trust_remote_code: bool) -> Any:
    """The configuration of a model; of an adapter, that of the model which it is for."""
    file = Path(name) / "adapter_config.json"
    if file.is_file() and not (Path(name) / "config.json").is_file():
        settings = parse_json(read_regular(file), str(file))
        base = (
            cast("dict[str, object]", settings).get("base_model_name_or_path") if isinstance(settings, dict) else None
        )
        name = base if isinstance(base, str) else name
    read = cast("Any", AutoConfig).from_pretrained
    try:
        return read(name, local_files_only=local, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name}: {error}") from error


def _check_weights(folder: Path) -> None:
    """Check that a folder has weights, and that those in safetensors are complete; a Hub name is no folder and passes.

    Args:
        folder: Folder of a model or an adapter.

    Raises:
        ValueError: If it has none, or a file was cut off.
    """
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise ValueError(f"cannot load {folder}: it has no weights (*.safetensors or *.bin)")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot load {file}: it is damaged ({error})") from None
    for index in folder.glob("*.index.json"):
        content = parse_json(read_regular(index), str(index))
        parts = cast("dict[str, Any]", content).get("weight_map") if isinstance(content, dict) else None
        for part in sorted(set(map(str, cast("dict[str, object]", parts).values()))) if isinstance(parts, dict) else []:
            if not (folder / part).is_file():
                raise ValueError(f"cannot load {folder}: {printable(part)} is missing, which {index.name} names")


def _prompts(job: Job, asked: int | None, tokenizer: Any, window: int | None, progress: Progress) -> Dataset:
    """The prompts of the evaluation, at most `asked` or as many as the run held out."""
    run = job.run
    if job.folder is not None and run.task is None:
        rows = held_out_prompts(
            run, tokenizer, window, completion=job.sampling.length, seed=job.sampling.seed, say=progress.say
        )
        return rows.select(range(min(asked or len(rows), len(rows))))
    count = asked or run.eval_prompts
    if run.task is not None:
        return load_task(run.task, count, checked_shots(run, tokenizer))[1]
    assert run.dataset is not None
    return checked_prompts(run, run.dataset, run.dataset_split, tokenizer, say=progress.say, first=count)
