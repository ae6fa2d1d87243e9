"""`bandpo train`: warm-up where needed, evaluation, training by TRL, evaluation, report."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # bandpo forks no process; the warning about it would be noise

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from bandpo._system.errors import exits_are_errors
from bandpo._system.files import write_json
from bandpo._system.progress import Progress, clock_time, quiet_hosts
from bandpo._system.secrets import redact, redact_text
from bandpo.integrations.trl import BandGRPOConfig
from bandpo.integrations.trl.generate import sampler_of
from bandpo.toy.models import WarmUp, warmed_up_model
from bandpo.train.arguments import EVALUATION_SEED
from bandpo.train.card import Facts, base_of, data_rows, finish_card, hub_datasets, write_card
from bandpo.train.compute import this_machine
from bandpo.train.config import DEFAULT_LENGTH, MATH, RunConfig, TrainerConfig, check_reporters, parse
from bandpo.train.data import load_tokenizer, run_pairs, run_prompts, window_of
from bandpo.train.evaluate import Evaluation, evaluate
from bandpo.train.folder import (
    choose_folder,
    environment,
    is_finished,
    make_folder,
    method_of,
    released_at_end,
)
from bandpo.train.grpo import GRPORun
from bandpo.train.interrupted import resumable
from bandpo.train.models import loadable, together
from bandpo.train.needs import missing, sampler_line
from bandpo.train.preference import PreferenceRun
from bandpo.train.progress import counting
from bandpo.train.record import Parts, resume_lines, shown_scores
from bandpo.train.report import change_line, evaluation_table
from bandpo.train.report_command import write_run_report
from bandpo.train.rewards import CheckedReward, checked_rewards, unscored_line
from bandpo.train.votes import voter_of


@dataclass(frozen=True)
class _Job:
    """One run: its configuration, and its parts after they have been read and checked."""

    run: RunConfig
    args: TrainerConfig
    folder: Path
    progress: Progress
    loaded: str
    """Folder or Hub name from which the model was loaded."""
    tokenizer: Any
    prompts: Dataset
    """What to train on: prompts, or pairs of completions."""
    held_out: Dataset
    rewards: list[CheckedReward]
    """The rewards of the run; the first one scores the evaluation."""
    method: GRPORun | PreferenceRun

    @property
    def temperature(self) -> float:
        """The sampling temperature of the evaluation."""
        return self.args.temperature if self.run.eval_temperature is None else self.run.eval_temperature


@released_at_end()
def train(arguments: list[str]) -> Path:
    """Run the job that the arguments describe.

    The folder of a run holds config.yaml (which repeats the run), env.json, metrics.jsonl, samples.jsonl, evaluation.json,
    figures/, report.html, the checkpoints and model/.

    Args:
        arguments: Command line after `bandpo train`.

    Returns:
        Folder of the results.

    Raises:
        ValueError: If an argument does not fit, or the run asks for what this machine has not.
    """
    started = time.monotonic()
    quiet_hosts()
    run, args, given, compute = parse(arguments)
    machine = this_machine()
    assert not run.dry_run  # `bandpo.train.start` makes a dry run
    if (lack := missing(run, args, machine)) is not None:
        raise ValueError(lack)
    with exits_are_errors():
        said = [line for line in (compute.line, sampler_line(args, machine)) if line is not None]
        return _train(run, args, given, said, started)


def _train(run: RunConfig, args: TrainerConfig, given: dict[str, Any], said: list[str], started: float) -> Path:
    check_reporters(args)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    progress = Progress(main=PartialState().is_main_process)
    resume = choose_folder(run, args, given, progress.say)
    folder = Path(args.output_dir or ".")
    if args.resume_from_checkpoint == "latest" and is_finished(folder, run, args, given):
        progress.say(f"the run in {folder} is finished: {folder / 'report.html'}")
        return folder
    progress.say(f"{method_of(run, args)} on {run.task or run.dataset} -> {folder}")
    for line in said:
        progress.say(line)
    job = _make_job(run, args, given, folder, progress, checkpoint=resume)
    if PartialState().is_main_process:
        _parts(job).write(folder)

    # The trainer's own handler of SIGTERM saves a checkpoint first.
    with resumable(folder, given, own_sigterm=not getattr(args, "enable_jit_checkpoint", False)):
        _work(job, resume, started)
    return folder


def _work(job: _Job, resume: str | None, started: float) -> None:
    """What a run does in its folder: evaluation, training, evaluation, results."""
    folder = job.folder
    job.method.writes_card(lambda: write_card(_facts(job), None, resume_lines(folder)))
    before = _evaluate_before(job)
    job.progress.say(f"before training: {_line(before.summary())}")
    job.method.train(resume)
    after = _evaluate(job, "after")
    evaluation = _results(job, before, after)

    if PartialState().is_main_process:
        write_card(_facts(job), evaluation, resume_lines(folder))
    PartialState().wait_for_everyone()
    job.method.save(folder / "model")
    if PartialState().is_main_process:
        finish_card(_facts(job))
        after.write(folder / "samples.jsonl", "after")
        _write_results(job, evaluation, started)


def _make_job(
    run: RunConfig,
    args: TrainerConfig,
    given: dict[str, Any],
    folder: Path,
    progress: Progress,
    *,
    checkpoint: str | None,
) -> _Job:
    """Read and check all parts of a run, make its folder, and build its trainer: a bad input leaves no folder behind."""
    model_name = str(_small_model(run, progress)) if run.model is None else loadable(run.model, progress.say)
    tokenizer, window = _load_tokenizer(model_name, args)
    prompts, held_out = _load_data(run, args, tokenizer, window, progress)
    rewards = checked_rewards(run, folder=folder, say=progress.say)
    model: Any = model_name  # TRL loads it, with model_init_kwargs
    if run.model is None:
        model = AutoModelForCausalLM.from_pretrained(model_name, trust_remote_code=False)
    make_folder(folder, run, args, given, checkpoint=checkpoint)
    args.disable_tqdm = True
    if isinstance(args, BandGRPOConfig):
        method = GRPORun(args, model, tokenizer, prompts, rewards, _lora(run), progress)
    else:
        method = PreferenceRun(run, args, model, tokenizer, prompts, rewards[0], _lora(run), progress)
    return _Job(run, args, folder, progress, model_name, tokenizer, prompts, held_out, rewards, method)


def _small_model(run: RunConfig, progress: Progress) -> Path:
    """The folder of the built-in model, warmed up on the task."""
    assert run.task is not None
    warm_up = WarmUp(task=run.task, steps=run.warm_up_steps)

    began = time.monotonic()

    def show(step: int, loss: float) -> None:
        took = time.monotonic() - began
        left = clock_time(took / step * (run.warm_up_steps - step))
        progress.say(f"  warm-up step {step}/{run.warm_up_steps}  loss {loss:.3f}  {clock_time(took)}, {left} left")

    together((lambda: warmed_up_model(warm_up, show, progress.say)) if PartialState().is_main_process else None)
    return warm_up.path


def _load_tokenizer(name: str, args: TrainerConfig) -> tuple[Any, int | None]:
    """The tokenizer of a model, and the number of its positions."""
    tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    try:
        return tokenizer, window_of(AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code))
    except OSError as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from error


def _load_data(
    run: RunConfig, args: TrainerConfig, tokenizer: Any, window: int | None, progress: Progress
) -> tuple[Dataset, Dataset]:
    """What to train on, prompts or pairs, and the held-out prompts."""
    prompts, held_out = run_prompts(
        run, tokenizer, window, completion=_longest_completion(args), seed=args.seed, say=progress.say
    )
    if run.pairs is None:
        return prompts, held_out
    max_length = cast("int | None", getattr(args, "max_length", None))
    pairs = run_pairs(run, held_out, tokenizer, window, max_length=max_length, say=progress.say)
    return pairs, held_out


def _lora(run: RunConfig) -> Any:
    """The configuration of LoRA for PEFT, None where all weights are trained."""
    if not run.lora_rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"lora_rank={run.lora_rank} needs peft: pip install peft ({error})") from error
    return LoraConfig(r=run.lora_rank, lora_alpha=run.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _evaluate_before(job: _Job) -> Evaluation:
    """The evaluation of the starting model; a resumed run reads it from its folder."""
    samples = job.folder / "samples.jsonl"
    found = Evaluation.read(samples, "before")
    PartialState().wait_for_everyone()  # every process has read the file before it changes
    if found is None:
        found = _evaluate(job, "before")
        if PartialState().is_main_process:
            found.write(samples, "before")
    return found


def _evaluate(job: _Job, when: str) -> Evaluation:
    count = -(-len(job.held_out) // cast("int", PartialState().num_processes)) * job.run.eval_samples
    shown = job.progress.stage(f"evaluating the model {when} training", count, "completions")
    with shown as advance, job.method.for_sampling() as model:
        return evaluate(
            model,
            job.tokenizer,
            job.held_out,
            counting(job.rewards[0], advance),
            samples=job.run.eval_samples,
            max_new_tokens=_longest_completion(job.args),
            temperature=job.temperature,
            top_p=job.args.top_p,
            seed=EVALUATION_SEED,
            batch_size=job.args.per_device_eval_batch_size,
            sampler=sampler_of(job.args),
            # An accelerator has its own context around each pass. On a CPU one around all of them rounds each weight once.
            autocast=torch.bfloat16 if job.args.bf16 and model.device.type == "cpu" else None,
            # Answers of math would have to be compared with each other, as long as scoring takes: `bandpo evaluate` does it.
            voter=None if job.rewards[0].name in MATH else voter_of(job.rewards[0].name, job.rewards[0].function),
        )


def _longest_completion(args: TrainerConfig) -> int:
    return DEFAULT_LENGTH if args.max_completion_length is None else args.max_completion_length


def _results(job: _Job, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """The content of evaluation.json."""
    return {
        "before": before.summary(),
        "after": after.summary(),
        "change": before.change_to(after)._asdict(),
        "prompts": len(job.held_out),
        "samples": job.run.eval_samples,
        "temperature": job.temperature,
        "top_p": job.args.top_p,
    }


def _facts(job: _Job) -> Facts:
    """What the run was, for the card of its model."""
    run, args = job.run, job.args
    name = redact(run.model)
    base = base_of(name, job.loaded)
    adapter = {"adapter": f"LoRA of rank {run.lora_rank}, alpha {run.lora_alpha}"} if run.lora_rank else {}
    return Facts(
        folder=job.folder,
        method=method_of(run, args),
        asked=args.objective,
        objective=job.method.objective,
        base=base,
        adapter=bool(run.lora_rank),
        chat=not isinstance(job.held_out["prompt"][0], str),
        data=redact(run.task or run.pairs or run.dataset),
        hub_data=tuple(hub_datasets(run)),
        rows={
            "model": name or "a small model that starts from scratch, warmed up on the task",
            **adapter,
            **data_rows(run, training=len(job.prompts), held_out=len(job.held_out)),
            "reward": _weighed(run, args),
            **job.method.length,
            "learning rate": args.learning_rate,
            "computed in": "float16" if args.fp16 else "bfloat16, weights in float32" if args.bf16 else "float32",
            "seed": args.seed,
        },
        longest=_longest_completion(args),
    )


def _weighed(run: RunConfig, args: TrainerConfig) -> str:
    """The rewards with their weights."""
    weights = cast("list[float] | None", getattr(args, "reward_weights", None))
    names = [redact_text(name) for name in run.rewards]
    return " + ".join(names if weights is None else [f"{w:g} {n}" for w, n in zip(weights, names, strict=True)])


def _write_results(job: _Job, evaluation: dict[str, Any], started: float) -> None:
    """Write the results of a run that has trained to its end, and print them."""
    folder, progress = job.folder, job.progress
    job.tokenizer.save_pretrained(folder / "model")
    write_json(folder / "evaluation.json", evaluation)
    write_json(folder / "env.json", environment(job.args, time.monotonic() - started))
    unscored = [line for reward in job.rewards if (line := unscored_line(reward)) is not None]
    method = job.method
    parts = replace(
        _parts(job), finished=True, notes=[*method.notes, *unscored], told=method.told, tokens=method.tokens
    )
    parts.write(folder)
    report, _ = write_run_report(folder)
    progress.show(evaluation_table(parts.title, evaluation))
    if (change := change_line(evaluation)) is not None:
        progress.say(change)
    for line in unscored:
        progress.say(line)
    progress.say(f"report: {report}")
    progress.say(f"model:  {folder / 'model'}")
    progress.say(f"done in {time.monotonic() - started:.0f} s")


def _parts(job: _Job) -> Parts:
    """What the report of a run shows from its beginning."""
    title = f"{job.method.name} on {redact(job.run.task or job.run.dataset)}, seed {job.args.seed}"
    return Parts(title, name=job.method.name, band=job.method.band)


def _line(summary: dict[str, float]) -> str:
    return "  ".join(f"{name} {summary[name]:.3f}" for name in shown_scores(summary))
