"""`bandpo train`: warm-up where needed, evaluation, BandPO training by TRL, evaluation, report."""

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we fork nothing; the warning about it is noise

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from bandpo.integrations.trl import BandGRPOConfig
from bandpo.lab.models import WarmUp, warmed_up_model
from bandpo.run.config import RunConfig, TrainerConfig, command_line, parse
from bandpo.run.data import RewardFunction, get_reward, load_pairs, load_prompts, load_task, split_prompts
from bandpo.run.evaluate import Evaluation, evaluate
from bandpo.run.grpo import GRPORun
from bandpo.run.preference import PreferenceRun
from bandpo.run.progress import Progress, quiet_hosts
from bandpo.run.report import write_report


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
        print(yaml.safe_dump(given, sort_keys=False), end="")
        return Path(args.output_dir or ".")
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    progress = Progress(main=PartialState().is_main_process)
    resume = _choose_folder(run, args, given)
    folder = Path(args.output_dir)
    progress.say(f"{args.objective} on {run.task or run.dataset} -> {folder}")

    model_name = run.model or str(_small_model(run, progress))
    tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="left", trust_remote_code=args.trust_remote_code)
    prompts, held_out = _load_data(run, chat=tokenizer.chat_template is not None, seed=args.seed)
    if run.pairs is not None:
        prompts = load_pairs(run.pairs, split=run.dataset_split)
    reward = get_reward(run.reward or run.task or "")
    if run.model is None:  # tiny: load it here; a large one is loaded by TRL, with model_init_kwargs
        model: Any = AutoModelForCausalLM.from_pretrained(model_name)
    else:
        model = model_name
    _make_folder(folder, given, resumed=resume is not None)  # what can be wrong in the input has been read by now
    args.disable_tqdm = True
    kind = GRPORun if isinstance(args, BandGRPOConfig) else PreferenceRun
    job = kind(run, args, model, tokenizer, prompts, reward, _lora(run), progress)  # type: ignore[arg-type]

    before = _evaluation_before(folder, job, tokenizer, held_out, reward, run, args, resumed=resume is not None)
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
            "temperature": run.eval_temperature,
        }  # fmt: skip
        _write_json(folder / "evaluation.json", evaluation)
        _write_json(folder / "env.json", _environment(args, time.monotonic() - started))
        title = f"{job.name} on {run.task or run.dataset}, seed {args.seed}"
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        report = write_report(folder, title=title, figures=job.figures(log))
        progress.table(title, evaluation)
        progress.say(f"report: {report}")
        progress.say(f"model:  {folder / 'model'}")
        progress.say(f"done in {time.monotonic() - started:.0f} s")
    return folder


def _choose_folder(run: RunConfig, args: TrainerConfig, given: dict[str, Any]) -> str | None:
    """Set the output folder; the checkpoint to resume from, if any.

    Nothing that exists is overwritten: a folder with a run in it is refused unless that run is resumed.
    """
    if "output_dir" not in given:
        label = args.objective.replace(":", "-") if run.method == "grpo" else run.method
        name = f"{label}-{Path(run.task or run.dataset or '').stem}-seed{args.seed}"
        [args.output_dir] = broadcast_object_list([str(_free_folder(Path("runs") / name))])
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume == "latest":
        resume = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if resume is None and any(folder.glob("rounds/*/round.json")):  # a preference run goes on after its last round
            resume = str(folder / "rounds")
        if resume is None:
            raise ValueError(f"resume_from_checkpoint=latest: {folder} has no checkpoint")
    if resume is None and (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"output_dir {folder} holds a run already; choose another, or go on with --resume_from_checkpoint latest"
        )
    if resume is not None and not Path(resume).is_dir():
        raise ValueError(f"resume_from_checkpoint: {resume} is no folder")
    return resume


def _make_folder(folder: Path, given: dict[str, Any], *, resumed: bool) -> None:
    PartialState().wait_for_everyone()  # all have looked before anything is made
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch()
        if not resumed:
            saved = {k: v for k, v in given.items() if k not in ("output_dir", "resume_from_checkpoint")}
            (folder / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    PartialState().wait_for_everyone()


def _free_folder(wanted: Path) -> Path:
    """The folder itself, or with the first number behind it that is free."""
    folder, number = wanted, 2
    while (folder / "metrics.jsonl").exists():
        folder, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return folder


def _small_model(run: RunConfig, progress: Progress) -> Path:
    assert run.task is not None
    warm_up = WarmUp(task=run.task, steps=run.warm_up_steps)
    if PartialState().is_main_process:
        if not warm_up.path.exists():
            progress.say(f"warming up a small model on {run.task} by supervised learning (once; cached)")
        warmed_up_model(
            warm_up, lambda step, loss: progress.say(f"  warm-up step {step}/{run.warm_up_steps}  loss {loss:.3f}")
        )
    PartialState().wait_for_everyone()
    return warm_up.path


def _load_data(run: RunConfig, *, chat: bool, seed: int) -> tuple[Dataset, Dataset]:
    if run.task is not None:
        return load_task(run.task, run.eval_prompts)
    columns = {
        "prompt_column": run.prompt_column,
        "answer_column": run.answer_column,
        "system_prompt": run.system_prompt,
    }
    assert run.dataset is not None
    data = load_prompts(run.dataset, config=run.dataset_config, split=run.dataset_split, chat=chat, **columns)
    if run.eval_dataset is None:
        return split_prompts(data, run.eval_prompts, seed)
    held_out = load_prompts(
        run.eval_dataset, config=run.dataset_config, split=run.eval_dataset_split, chat=chat, **columns
    )
    return data, held_out.select(range(min(run.eval_prompts, len(held_out))))


def _lora(run: RunConfig) -> Any:
    if not run.lora_rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"lora_rank={run.lora_rank} needs peft: pip install peft ({error})") from error
    return LoraConfig(r=run.lora_rank, lora_alpha=run.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


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
            temperature=run.eval_temperature,
            seed=1234,
            batch_size=args.per_device_eval_batch_size,
        )


def _evaluation_before(
    folder: Path, job: GRPORun | PreferenceRun, tokenizer: Any, rows: Dataset, reward: RewardFunction, run: RunConfig,
    args: TrainerConfig, *, resumed: bool,
) -> dict[str, float]:  # fmt: skip
    """The evaluation of the starting model; a resumed run reads it back from its folder."""
    samples = folder / "samples.jsonl"
    if resumed:
        saved = [json.loads(line) for line in samples.read_text().splitlines()]
        saved = [row for row in saved if row["stage"] == "before"]
        found = Evaluation(
            [r["prompt"] for r in saved], [r["completions"] for r in saved], [r["rewards"] for r in saved]
        )
        PartialState().wait_for_everyone()  # all have read
        if PartialState().is_main_process:
            samples.unlink()
            found.write(samples, "before")
        return found.summary()
    found = _evaluate(job, tokenizer, rows, reward, run, args)
    if PartialState().is_main_process:
        found.write(samples, "before")
    return found.summary()


def _environment(args: TrainerConfig, seconds: float) -> dict[str, Any]:
    """What a reader needs to trust or repeat the numbers."""
    packages = ("bandpo", "torch", "transformers", "trl", "accelerate", "datasets", "reasoning-gym")
    return {
        "command": command_line(),
        "seed": args.seed,
        "seconds": round(seconds, 1),
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    """Revision of the working folder, where it is a git checkout."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None if found.returncode == 0 else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _line(summary: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in summary.items())
