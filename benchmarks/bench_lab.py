"""The lab: a stack of many small models beside the same models in turn, and the growth of a comparison with its runs."""

import dataclasses
import itertools
import statistics
import time

import pytest
import torch

from bandpo import OBJECTIVES
from bandpo.lab.comparison.loop import Loop, Run, Setting
from bandpo.lab.comparison.plan import PRESETS, jobs_of, report_arms
from bandpo.lab.comparison.stack import Stack
from bandpo.lab.comparison.study import Study, run_stack
from bandpo.lab.comparison.summary import summarise
from bandpo.metrics import policy_sums
from bandpo.terms import token_objective
from bandpo.toy.models import WarmUp, build_model, build_tokenizer

MODELS, PROMPTS, GROUP, START, WIDTH, NEW = 12, 16, 8, 2, 64, 8
"""Unless a row varies them: models, prompts of each, samples of a prompt, tokens of a prompt, width, tokens of a completion."""


def case(models=MODELS, width=WIDTH, new=NEW):
    tokenizer = build_tokenizer()
    made = [build_model(WarmUp(hidden_size=width, layers=2, seed=s), tokenizer).eval() for s in range(models)]
    for model in made:
        model.config.max_position_embeddings = 256  # no more than a warning of transformers
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 90, (models, PROMPTS, START), generator=g)
    return made, Stack.load(made), prompts, torch.rand(models, PROMPTS * GROUP, new, generator=g)


def sampling(**changes):
    models, stack, prompts, noise = case(**changes)
    full = prompts.repeat_interleave(GROUP, 1)
    mask = torch.ones_like(full[0])
    new = noise.shape[-1]

    def in_turn():
        for run, model in enumerate(models):
            model.generate(
                input_ids=full[run], attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
                do_sample=True, top_k=0, pad_token_id=0,
            )  # fmt: skip

    return {"stack": lambda: stack.sample(prompts, noise, end=-1, pad=0, repeats=GROUP), "generate": in_turn}


def updating(**changes):
    models, stack, prompts, noise = case(**changes)
    for w in stack.weights.values():
        w.requires_grad_()
    full = prompts.repeat_interleave(GROUP, 1)
    completions = torch.randint(3, 90, noise.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.cat([full, completions], -1)

    def ours():
        for which in stack.parts(ids.shape[1] * ids.shape[2]):
            part = stack.part(which)
            total = part.logprobs(full[which], completions[which]).sum()
            torch.autograd.grad(total, list(part.weights.values()))

    def in_turn():
        for run, model in enumerate(models):
            logits = model(input_ids=ids[run]).logits[:, START - 1 : -1]
            chosen = logits.log_softmax(-1).gather(-1, completions[run].unsqueeze(-1))
            torch.autograd.grad(chosen.sum(), list(model.parameters()))

    return {"stack": ours, "in turn": in_turn}


def alternated(cases, rounds=3):
    """The median CPU seconds of each case."""
    times = {name: [] for name in cases}
    for round_ in range(rounds + 1):
        for name, run in cases.items():
            start = time.process_time()
            run()
            if round_:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


VARIED = {"models": (1, 4, 12, 48), "width": (32, 64, 128, 256), "new": (8, 32, 128)}
NAMES = {"models": "models", "width": "width", "new": "tokens"}


@pytest.mark.parametrize(("what", "make"), [("rollout", sampling), ("update", updating)])
@pytest.mark.parametrize("varied", VARIED)
def test_stack_against_models_in_turn(report, what, make, varied):
    ratios, per_second, sizes = [], [], VARIED[varied]
    for size in sizes:
        cases = make(**{"models": 4, varied: size})
        seconds = alternated(cases)
        theirs = next(name for name in cases if name != "stack")
        ratios.append(seconds[theirs] / seconds["stack"])
        per_second.append(
            (4 if varied != "models" else size)
            * PROMPTS
            * GROUP
            * (size if varied == "new" else NEW)
            / seconds["stack"]
        )
    note = ", ".join(
        f"{size}: {ratio:.1f} ({speed / 1e3:.0f}k tokens/s)"
        for size, ratio, speed in zip(sizes, ratios, per_second, strict=True)
    )
    middle = sorted(ratios)[len(ratios) // 2]
    name = f"lab: {what}, models in turn / stack, by {NAMES[varied]}"
    more = {"equivalent": theirs, "sizes": list(sizes), "ratios": [round(r, 3) for r in ratios]}
    report(name, middle, "x", ">= 3" if what == "rollout" else "", note, **more)


def test_share_of_the_metrics_in_an_update(report, paired):
    """What the lab records at a step of the last epoch, beside the whole step."""
    loop = Loop(Setting("paths", updates=1, prompts=16, warm_up_steps=300), [Run(OBJECTIVES["bandpo-kl"], 1e-3)])
    loop.update()
    shape = (32, loop.problem.length)
    logprobs = -torch.rand(shape, generator=torch.Generator().manual_seed(0))
    batch = {"logprobs": logprobs, "old_logprobs": logprobs - 0.1, "advantages": torch.ones(32), "mask": logprobs < 0}
    terms = token_objective(OBJECTIVES["bandpo-kl"], **batch)
    seconds = paired({"metrics": lambda: policy_sums(terms, detail="full"), "update": loop.update}, rounds=5)
    # One of the two epochs of four steps counts.
    report(
        "lab: metrics' share of a rollout and its updates", 4 * seconds["metrics"] / seconds["update"], "x", "<= 0.05"
    )


def test_growth_of_a_comparison(compare, tmp_path):
    """Tiny runs, their files, and the statistics of all of them, in this process."""
    base, count = dataclasses.replace(PRESETS["smoke"], updates=1, tuning_seeds=0), itertools.count()

    def make(runs):
        plan = dataclasses.replace(base, seeds=tuple(range(runs // 6)))

        def ours():
            study = Study(tmp_path / str(next(count)), say=lambda _: None)
            jobs = jobs_of(plan, "paths", report_arms(plan), plan.seeds)
            for first in range(0, len(jobs), 12):
                stack = jobs[first : first + 12]
                study._keep(stack, run_stack(stack), "")
            summarise(study, plan)

        return {"ours": ours}

    compare("lab: growth of a comparison with its runs", make, (24, 48, 96), target="<= 1.1", rounds=1)
