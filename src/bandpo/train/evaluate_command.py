"""`bandpo evaluate`: the model of a run on the prompts that the run held out, or any model on named prompts."""

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from bandpo._system.about import about, plain
from bandpo._system.bounded import parse_json, read_regular
from bandpo._system.errors import exits_are_errors, printable
from bandpo._system.files import write_json
from bandpo._system.progress import Progress, quiet_hosts
from bandpo._system.secrets import redact_text
from bandpo.integrations.trl.generate import sampler_of
from bandpo.train.compute import Compute, choose, count_parameters, this_machine
from bandpo.train.data import checked_prompts, checked_shots, held_out_prompts, load_task, load_tokenizer, window_of
from bandpo.train.evaluate import Evaluation, evaluate
from bandpo.train.evaluate_options import Job, Sampling
from bandpo.train.models import loadable
from bandpo.train.rewards import CheckedReward, get_reward, unscored_line


def evaluate_model(job: Job, sampling: Sampling, options: argparse.Namespace) -> dict[str, float]:
    """Sample a model on held-out prompts and score the samples, print the summary, and write it if a file is named.

    Args:
        job: What to evaluate on what.
        sampling: How to sample.
        options: The options of `bandpo evaluate`.

    Returns:
        Summary of the evaluation, as in `Evaluation.summary`.
    """
    quiet_hosts()
    progress = Progress()
    with exits_are_errors():
        model_name = loadable(job.model, progress.say)
    local = Path(model_name).is_dir()  # its files may name others, which are not downloaded for it
    tokenizer = load_tokenizer(model_name, local=local, trust_remote_code=options.trust_remote_code)
    with exits_are_errors():
        reward = CheckedReward(
            get_reward(job.reward, workers=job.run.reward_workers),
            job.reward,
            limit=job.run.reward_timeout,
            errors="skip",
            say=progress.say,
        )
        compute = _compute(job, model_name, options, local=local)
        if compute.line is not None:
            progress.say(compute.line)
        _check_base(Path(model_name), job.run.model if job.folder is not None else None)
        model = _load_model(model_name, compute, local=local, trust_remote_code=options.trust_remote_code)
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
            autocast=torch.bfloat16 if compute.bf16 else None,
        )
    summary = result.summary()
    _print(job, sampling, result, progress)
    if (line := unscored_line(reward)) is not None:
        progress.say(line)
    if options.output is not None:
        _write(job, sampling, result, options)
    return summary


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


def _print(job: Job, sampling: Sampling, result: Evaluation, progress: Progress) -> None:
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


def _write(job: Job, sampling: Sampling, result: Evaluation, options: argparse.Namespace) -> None:
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
