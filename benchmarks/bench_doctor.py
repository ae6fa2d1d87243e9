"""The doctor, the report and resuming on files of several sizes, beside a plain reading of the same files."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from bandpo._system.jsonl import keep_rows, number_texts
from bandpo.doctor import examine_batch, examine_log
from bandpo.doctor.batch import load_batch
from bandpo.doctor.logs import read_log
from bandpo.metrics import PROB_BINS
from bandpo.plots import plot_clip_by_probability, plot_training
from bandpo.plots.curves import Curves
from bandpo.train.progress import _is_kept, _is_surely_kept
from bandpo.train.report import write_report

TOKENS, ROWS = (100_000, 1_000_000, 10_000_000), (1_000, 10_000, 100_000)
NAMES = (
    *("loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "entropy", "ratio/mean"),
    *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "completions/clipped_ratio"),
    *("nonfinite_fraction", "reward/unscored", "band/cap_fraction", "band/divergence_mean", "band/divergence_max"),
    *(f"token_fraction_by_prob/{name}" for name in PROB_BINS),
    *(f"clip_fraction_by_prob/{side}/{name}" for side in ("low", "high", "any") for name in PROB_BINS),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("doctor")


def batch_of(folder, tokens):
    path = folder / f"{tokens}.safetensors"
    if not path.exists():
        g = torch.Generator().manual_seed(0)
        shape = (tokens // 1000, 1000)
        old = torch.rand(shape, generator=g).pow_(3).mul_(-8).sub_(1e-3)
        new = torch.randn(shape, generator=g).mul_(0.1).add_(old).clamp_(max=-1e-6)
        advantages = torch.randn(shape[0], 1, generator=g).expand(shape).contiguous()
        mask = torch.rand(shape, generator=g) < 0.9
        save_file({"logprobs": new, "old_logprobs": old, "advantages": advantages, "mask": mask}, path)
    return path


def log_of(folder, rows):
    """Rows of 2.4 KB, all of them with all metrics."""
    path = folder / f"{rows}.jsonl"
    if not path.exists():
        random.seed(0)
        texts = [json.dumps({name: random.random() for name in NAMES})[1:] for _ in range(200)]
        with path.open("w") as file:
            file.writelines(f'{{"step": {i}, {texts[i % 200]}\n' for i in range(rows))
    return path


def test_doctor_on_a_batch(compare, folder):
    def make(tokens):
        path = batch_of(folder, tokens)

        def plain():
            """The tokens that PPO's clip of 0.2 leaves out, and the quantile of |log r|, in float32."""
            b = load_file(path)
            x, a = (b["logprobs"] - b["old_logprobs"])[b["mask"]], b["advantages"][b["mask"]]
            r = x.exp()
            outside = ((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8))
            return outside.double().mean(), x.abs().kthvalue(int(0.99 * len(x)))

        return {"ours": lambda: examine_batch(load_batch(path)), "one clip and one quantile": plain}

    compare("doctor on a batch (six regions, three radii)", make, TOKENS, rounds=2, note="tokens; 13 B each")


_BATCH = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from bandpo.doctor import examine_batch
from bandpo.doctor.batch import load_batch
examine_batch(load_batch(Path(sys.argv[1])))
START()
examine_batch(load_batch(Path(sys.argv[2])))
"""


def test_memory_of_the_doctor_on_a_batch(peak_memory, report, folder):
    small = batch_of(folder, TOKENS[0])
    peaks = {n: peak_memory(_BATCH, small, batch_of(folder, n))[0] / 1e6 for n in TOKENS}
    listed = ", ".join(f"{peak:.0f} at {n:,}" for n, peak in peaks.items())
    report("memory of the doctor on a batch of 10,000,000 tokens", peaks[TOKENS[-1]], "MB", "<= 2000", listed)


def plain_reading(path):
    def read():
        with path.open() as file:
            for line in file:
                json.loads(line)

    return read


def test_reading_a_log(compare, folder):
    def cases(ours):
        return lambda rows: {
            "ours": ours(log_of(folder, rows)),
            "json.loads of each line": plain_reading(log_of(folder, rows)),
        }

    compare(
        "doctor on metrics.jsonl", cases(lambda p: lambda: examine_log(read_log(p))), ROWS, target="<= 1.3", rounds=2
    )
    compare(
        "curves of metrics.jsonl", cases(lambda p: lambda: Curves(number_texts(p))), ROWS, target="<= 1.3", rounds=2
    )

    def resumed(path):
        last = int(path.stem) - 1
        return lambda: keep_rows(path, lambda row: _is_kept(row, last), sure=lambda line: _is_surely_kept(line, last))

    compare("resuming a run with metrics.jsonl", cases(resumed), ROWS, target="<= 1", rounds=2)


_LOG = """
import sys
from pathlib import Path
from bandpo.doctor import examine_log
from bandpo.doctor.logs import read_log
from bandpo.plots.curves import Curves
from bandpo._system.jsonl import number_texts
START()
examine_log(read_log(Path(sys.argv[1])))
Curves(number_texts(Path(sys.argv[1])))
"""


def test_memory_of_reading_a_log(peak_memory, report, folder):
    peaks = {n: peak_memory(_LOG, log_of(folder, n))[0] / 1e6 for n in ROWS}
    listed = ", ".join(f"{peak:.1f} MB at {n:,}" for n, peak in peaks.items())
    report("memory of doctor and curves, 100,000 rows", peaks[ROWS[-1]], "MB", "<= 20", listed)


def test_report_of_a_long_run(compare, report, folder):
    samples = [
        {"stage": s, "prompt": f"{i}", "completions": ["x" * 100], "rewards": [0.0]}
        for s in ("before", "after")
        for i in range(12)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    scores = {"mean@4": 0.1}
    evaluation = {"before": scores, "after": scores, "prompts": 12, "samples": 1, "temperature": 1.0}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "env.json").write_text(
        json.dumps({"command": "x", "versions": {"bandpo": "1"}, "seconds": 1, "device": "cpu"})
    )
    (folder / "config.yaml").write_text("a: 1\n")
    pages = []

    def make(rows):
        path = log_of(folder, rows)

        def ours():
            curves = Curves(number_texts(path))
            figures = {"Training": plot_training(curves), "Who is clipped": plot_clip_by_probability(curves)}
            pages.append(write_report(folder, title="a run", figures=figures).stat().st_size)

        return {"ours": ours, "json.loads of each line": plain_reading(path)}

    compare("report of a run", make, ROWS, rounds=2)
    report(
        "size of the report, 100,000 rows", pages[-1] / 1e6, "MB", "<= 2", "figures, samples and settings in one page"
    )
