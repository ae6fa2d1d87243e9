"""`bandpo train`: warm-up where needed, evaluation, BandPO training by TRL, evaluation, report."""

import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we fork nothing; the warning about it is noise

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from bandpo._system.errors import exits_are_errors
from bandpo._system.files import read_jsonl, write_json
from bandpo._system.secrets import redact
from bandpo.integrations.trl import BandGRPOConfig
from bandpo.integrations.trl.generate import sampler_of
from bandpo.toy.models import WarmUp, warmed_up_model
from bandpo.train.config import RunConfig, TrainerConfig, parse
from bandpo.train.data import load_pairs, load_tokenizer, run_prompts, window_of
from bandpo.train.evaluate import Evaluation, evaluate
from bandpo.train.folder import choose_folder, environment, is_finished, make_folder, released_at_end
from bandpo.train.grpo import GRPORun
from bandpo.train.preference import PreferenceRun
from bandpo.train.progress import Progress, quiet_hosts
from bandpo.train.report import write_report
from bandpo.train.rewards import CheckedReward, RewardFunction, get_reward, unscored_line


@released_at_end()
def train(arguments: list[str]) -> Path:
    """Run the job that the arguments describe; the folder of its results.

    The folder holds config.yaml (which repeats the run), env.json, metrics.jsonl, samples.jsonl, evaluation.json, figures/,
    report.html, the checkpoints and model/.

    Args:
        arguments: Command line after `bandpo train`.
    """
    started = time.monotonic()
    quiet_hosts()
    run, args, given = parse(arguments)
    if run.dry_run:
        print(yaml.safe_dump(redact(given), sort_keys=False), end="")
        return Path(args.output_dir or ".")
    with exits_are_errors():
        return _train(run, args, given, started)


def _train(run: RunConfig, args: TrainerConfig, given: dict[str, Any], started: float) -> Path:
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    progress = Progress(main=PartialState().is_main_process)
    resume = choose_folder(run, args, given, progress.say)
    folder = Path(args.output_dir or ".")
    if args.resume_from_checkpoint == "latest" and is_finished(folder, given):
        progress.say(f"the run in {folder} is finished: {folder / 'report.html'}")
        return folder
    progress.say(f"{args.objective} on {run.task or run.dataset} -> {folder}")

    model_name = run.model or str(_small_model(run, progress))
    tokenizer, window = _load_tokenizer(model_name, args)
    prompts, held_out = _load_data(run, args, tokenizer, window, progress)
    reward = CheckedReward(
        get_reward(run.reward or run.task or ""), run.reward or run.task or "", limit=run.reward_timeout,
        errors=run.reward_errors, folder=folder, say=progress.say,
    )  # fmt: skip
    if run.model is None:  # tiny: load it here; a large one is loaded by TRL, with model_init_kwargs
        model: Any = AutoModelForCausalLM.from_pretrained(model_name, trust_remote_code=False)
    else:
        model = model_name
    # What can be wrong in the input has been read by now.
    make_folder(folder, run, args, given, resumed=resume is not None)
    args.disable_tqdm = True
    kind = GRPORun if isinstance(args, BandGRPOConfig) else PreferenceRun
    job = kind(run, args, model, tokenizer, prompts, reward, _lora(run), progress)  # type: ignore[arg-type]

    before = _evaluation_before(folder, job, tokenizer, held_out, reward, run, args)
    progress.say(f"before training: {_line(before)}")
    job.train(resume)
    after_samples = _evaluate(job, tokenizer, held_out, reward, run, args)
    after = after_samples.summary()

    job.save(folder / "model")
    if PartialState().is_main_process:
        tokenizer.save_pretrained(folder / "model")
        after_samples.write(folder / "samples.jsonl", "after")
        evaluation = {
            "before": before, "after": after, "prompts": len(held_out), "samples": run.eval_samples,
            "temperature": _temperature(run, args), "top_p": args.top_p,
        }  # fmt: skip
        write_json(folder / "evaluation.json", evaluation)
        write_json(folder / "env.json", environment(args, time.monotonic() - started))
        title = f"{job.name} on {redact(run.task or run.dataset)}, seed {args.seed}"
        log = read_jsonl(folder / "metrics.jsonl")
        unscored = unscored_line(reward)
        notes = [*job.notes, *([unscored] if unscored else [])]
        report = write_report(folder, title=title, figures=job.figures(log), notes=notes)
        progress.table(title, evaluation)
        if unscored:
            progress.say(unscored)
        progress.say(f"report: {report}")
        progress.say(f"model:  {folder / 'model'}")
        progress.say(f"done in {time.monotonic() - started:.0f} s")
    return folder


def _small_model(run: RunConfig, progress: Progress) -> Path:
    assert run.task is not None
    warm_up = WarmUp(task=run.task, steps=run.warm_up_steps)
    if PartialState().is_main_process:
        warmed_up_model(
            warm_up, lambda step, loss: progress.say(f"  warm-up step {step}/{run.warm_up_steps}  loss {loss:.3f}"),
            progress.say,
        )  # fmt: skip
    PartialState().wait_for_everyone()
    return warm_up.path


def _load_tokenizer(name: str, args: TrainerConfig) -> tuple[Any, int | None]:
    """A model's tokenizer, and how many positions the model knows."""
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
        run, tokenizer, window, completion=args.max_completion_length, seed=args.seed, say=progress.say
    )
    if run.pairs is not None:
        limits = [n for n in (getattr(args, "max_length", None), window) if n is not None]
        prompts = load_pairs(
            run.pairs, split=run.dataset_split, held_out=held_out, tokenizer=tokenizer,
            system_prompt=None if run.task else run.system_prompt, limit=min(limits, default=None),
            skip_bad=run.bad_rows == "skip", say=progress.say,
        )  # fmt: skip
    return prompts, held_out


def _lora(run: RunConfig) -> Any:
    if not run.lora_rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"lora_rank={run.lora_rank} needs peft: pip install peft ({error})") from error
    return LoraConfig(r=run.lora_rank, lora_alpha=run.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _temperature(run: RunConfig, args: TrainerConfig) -> float:
    """That of the evaluation."""
    return args.temperature if run.eval_temperature is None else run.eval_temperature


def _evaluate(
    job: GRPORun | PreferenceRun,
    tokenizer: Any,
    rows: Dataset,
    reward: RewardFunction,
    run: RunConfig,
    args: TrainerConfig,
) -> Evaluation:
    with job.for_sampling() as model:
        return evaluate(
            model,
            tokenizer,
            rows,
            reward,
            samples=run.eval_samples,
            max_new_tokens=args.max_completion_length,
            temperature=_temperature(run, args),
            top_p=args.top_p,
            seed=1234,
            batch_size=args.per_device_eval_batch_size,
            sampler=sampler_of(args),
        )


def _evaluation_before(
    folder: Path, job: GRPORun | PreferenceRun, tokenizer: Any, rows: Dataset, reward: RewardFunction, run: RunConfig,
    args: TrainerConfig,
) -> dict[str, float]:  # fmt: skip
    """The evaluation of the starting model; a resumed run has it in its folder."""
    samples = folder / "samples.jsonl"
    found = Evaluation.read(samples, "before")
    PartialState().wait_for_everyone()  # all have read
    if found is None:
        found = _evaluate(job, tokenizer, rows, reward, run, args)
        if PartialState().is_main_process:
            found.write(samples, "before")
    return found.summary()


def _line(summary: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in summary.items())
