"""Rollout tokens of many small models: one stack against transformers' generate on each model in turn."""

import torch

from bandpo.lab.comparison.stack import Stack
from bandpo.toy.models import WarmUp, build_model, build_tokenizer

RUNS, PROMPTS, GROUP, WIDTH, NEW = 12, 16, 8, 2, 8


def test_stack_against_generate(paired, report):
    tokenizer = build_tokenizer()
    models = [build_model(WarmUp(hidden_size=64, layers=2, seed=s), tokenizer).eval() for s in range(RUNS)]
    stack = Stack.load(models)
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 90, (RUNS, PROMPTS, WIDTH), generator=g)
    noise = torch.rand(RUNS, PROMPTS * GROUP, NEW, generator=g)
    full = prompts.repeat_interleave(GROUP, 1)
    mask = torch.ones_like(full[0])

    def generate():
        for run, model in enumerate(models):
            model.generate(
                input_ids=full[run],
                attention_mask=mask,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )

    def sample():
        stack.sample(prompts, noise, end=-1, pad=0, repeats=GROUP)

    seconds = paired({"generate": generate, "stack": sample}, rounds=9)
    tokens = RUNS * PROMPTS * GROUP * NEW
    note = f"{tokens / seconds['stack'] / 1e3:.0f}k against {tokens / seconds['generate'] / 1e3:.0f}k tokens a second"
    report(
        "lab: generate of 12 models in turn / their stack", seconds["generate"] / seconds["stack"], "x", ">= 3", note
    )
