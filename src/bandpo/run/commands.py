"""`bandpo evaluate`."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bandpo._files import write_json
from bandpo.lab.tasks import TASKS
from bandpo.run.about import about
from bandpo.run.data import load_prompts, load_task
from bandpo.run.evaluate import evaluate
from bandpo.run.progress import Progress, quiet_hosts
from bandpo.run.rewards import CheckedReward, get_reward, unscored_line


def evaluate_model(options: argparse.Namespace) -> dict[str, float]:
    """Sample a model on held-out prompts, print the summary and write it where asked.

    Args:
        options: The options of `bandpo evaluate`.
    """
    if options.task is not None and options.dataset is not None:
        raise ValueError(f"--task {options.task} and --dataset {options.dataset} are both set; choose one")
    for name in ("prompts", "samples", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    task = options.task or (None if options.dataset else "countdown")
    if task is not None and task not in TASKS:
        raise ValueError(f"--task {task}: choose one of {', '.join(TASKS)}")
    if task is None and options.reward is None:
        raise ValueError("--dataset needs --reward: math or package.module:NAME")
    quiet_hosts()
    progress = Progress()
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(options.model)
    except OSError as error:
        raise ValueError(f"cannot load {options.model}: {error}") from error
    if torch.cuda.is_available():
        model = model.to("cuda")
    if task is not None:
        _, rows = load_task(task, options.prompts)
        length = options.max_new_tokens or TASKS[task].max_completion_length
    else:
        rows = load_prompts(
            options.dataset,
            config=options.dataset_config,
            split=options.dataset_split,
            prompt_column=options.prompt_column,
            answer_column=options.answer_column,
            system_prompt=options.system_prompt,
            chat=tokenizer.chat_template is not None,
        )
        rows = rows.select(range(min(options.prompts, len(rows))))
        length = options.max_new_tokens or 1024
    name = options.reward or task or ""
    reward = CheckedReward(get_reward(name), name, errors="skip", say=progress.say)
    result = evaluate(
        model, tokenizer, rows, reward, samples=options.samples, max_new_tokens=length,
        temperature=options.temperature, top_p=options.top_p, seed=options.seed, batch_size=options.batch_size,
    )  # fmt: skip
    summary = result.summary()
    progress.say(f"{options.model} on {len(rows)} prompts of {task or options.dataset}, {options.samples} samples each")
    for name, value in summary.items():
        progress.say(f"  {name:<20} {value:.4f}")
    if (line := unscored_line(reward)) is not None:
        progress.say(line)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        found = {"model": options.model, "prompts": len(rows), **summary}
        write_json(options.output, {**found, "about": about(seed=options.seed, options=_plain(options))})
    return summary


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    """Options as JSON."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("run", "command")}
