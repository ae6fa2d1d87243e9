"""The arithmetic of a run: how many prompts it samples, how often it uses each of them, and how many tokens that is at most."""

import math
from typing import Any

from bandpo.train.config import DEFAULT_LENGTH, RunConfig


def plan_mistakes(run: RunConfig, args: Any, training: int, held_out: int) -> list[str]:
    """Why a run with this data would take no step.

    Args:
        run: bandpo's part of the configuration.
        args: TRL's part of the configuration.
        training: Number of prompts or pairs to train on.
        held_out: Number of prompts of the evaluation.
    """
    del held_out
    if run.method != "grpo":
        return []
    prompts = args.generation_batch_size // args.num_generations
    if training < prompts:
        return [
            f"the data has {training} prompts and a rollout takes {prompts}, so that there would be no step: lower "
            "per_device_train_batch_size or steps_per_generation, raise num_generations, or give more prompts"
        ]
    return []


def plan_lines(run: RunConfig, args: Any, training: int, held_out: int) -> list[str]:
    """Lines about what a run does with its data.

    Args:
        run: bandpo's part of the configuration.
        args: TRL's part of the configuration.
        training: Number of prompts or pairs to train on.
        held_out: Number of prompts of the evaluation.
    """
    completion = args.max_completion_length or DEFAULT_LENGTH
    if run.pairs is not None:
        lines = _of_pairs(args, training)
    elif run.method != "grpo":
        lines = _of_rounds(args, training, completion)
    else:
        lines = _of_rollouts(args, training, completion)
    scored = held_out * run.eval_samples
    return [
        *lines,
        f"evaluation: {held_out} prompts x {run.eval_samples} completions before training and after it, at most "
        f"{_count(2 * scored * completion)} tokens",
    ]


def _of_rollouts(args: Any, training: int, completion: int) -> list[str]:
    completions, group = args.generation_batch_size, args.num_generations
    prompts = completions // group
    each = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    if args.max_steps > 0:
        steps = args.max_steps
        rollouts = math.ceil(steps / each)
    else:
        rollouts = math.ceil(args.num_train_epochs * (training // prompts))
        steps = math.ceil(rollouts * each)
    sampled, plural = rollouts * prompts, "s" * (rollouts != 1)
    times = f"{sampled / training:.3g} times the {training} of the data"
    refilled = f", and up to {args.dynamic_sampling} times more by dynamic_sampling" if args.dynamic_sampling else ""
    return [
        f"a rollout with this number of processes: {prompts} prompts x {group} completions of up to {completion} tokens, for "
        f"{each:g} optimiser steps",
        f"the run: {steps} optimiser steps, {rollouts} rollout{plural}, {sampled} prompts sampled ({times}), at most "
        f"{_count(sampled * group * completion)} tokens{refilled}",
    ]


def _of_pairs(args: Any, training: int) -> list[str]:
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil(training / size))
    return [
        f"the run: {steps} optimiser steps of {size} pairs, which is {steps * size / training:.3g} times the {training} pairs"
    ]


def _of_rounds(args: Any, training: int, completion: int) -> list[str]:
    prompts, samples = args.prompts_per_round, args.samples_per_prompt
    sampled = prompts * (args.rounds if args.resample else 1)
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    passes = f"{args.num_train_epochs:g} passes over its pairs, in batches of {size}"
    each = f"{args.max_steps} optimiser steps" if args.max_steps > 0 else passes
    return [
        f"the run: {args.rounds} rounds, each of {prompts} prompts x {samples} completions of up to {completion} tokens"
        f"{'' if args.resample else ' (sampled once)'}, at most {prompts * args.pairs_per_prompt} pairs, and {each}; "
        "max_steps and num_train_epochs are those of one round",
        f"{sampled} prompts sampled ({sampled / training:.3g} times the {training} of the data), at most "
        f"{_count(sampled * samples * completion)} tokens",
    ]


def _count(number: float) -> str:
    """A number of tokens for a message.

    Examples:
        >>> _count(950), _count(1_234_000)
        ('950', '1.23M')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{number:g}"
