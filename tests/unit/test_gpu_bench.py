"""`make gpu` at a tiny size on the CPU: nothing of it may fail for the first time on a GPU that is lent for minutes."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(scope="module")
def modules():
    """The modules of `benchmarks/gpu`, which import each other by their bare names."""
    names = ("measure", "decoder", "train", "weights")
    sys.path[:0] = [str(GPU), str(ROOT / "benchmarks")]
    found = {name: importlib.import_module(name) for name in names}
    spec = importlib.util.spec_from_file_location("gpu_main", GPU / "__main__.py")
    found["main"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found["main"])
    yield type("Modules", (), found)
    sys.path[:] = [x for x in sys.path if x not in (str(GPU), str(ROOT / "benchmarks"))]
    for name in (*names, "kernel", "loss", "head", "suite", "formulas", "record", "seconds"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(modules, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    modules.weights.random_model(path)
    return path


def make_gpu(*arguments, **environment):
    """`python benchmarks/gpu`, and what it wrote."""
    done = subprocess.run(
        [sys.executable, str(GPU), *arguments], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
    )  # fmt: skip
    out = Path(arguments[arguments.index("--out") + 1])
    return done, json.loads((out / "gpu.json").read_text(encoding="utf-8")) if (out / "gpu.json").exists() else None


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    done, found = make_gpu("--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {part["part"]: part["outcome"] for part in found["parts"]} == dict.fromkeys(
        ("tests", "kernel", "loss", "head", "train"), "done"
    )
    rows = {(row["part"], row["what"]): row for row in found["rows"] if "what" in row}
    assert not [row for row in rows.values() if row["met"] == "no"]
    parts = {part for part, _ in rows}
    assert parts == {"tests", "kernel", "loss", "head", "train"}
    if HAS_TRITON:
        for what in ("kernel = plain path, KL, tokens judged otherwise", "kernel, 4096 tokens, share of the copy"):
            assert rows["kernel", what]["value"] is not None
        assert rows["tests", "tests that fail on the device"]["value"] == 0
    assert rows["loss", "bandpo-kl, compiled / grpo, compiled, 2048 tokens"]["value"] > 0
    runs = [row for row in found["rows"] if "run" in row]
    assert [row["arm"] for row in runs] == ["bandpo-kl", "bandpo-kl-upper", "grpo"] and len(runs[0]["curve"]) == 2
    assert found["machine"]["tiny"] and {"card", "torch", "triton", "transformers", "commit", "driver"} - {
        "driver"
    } <= set(found["machine"])
    assert "train: done" in done.stdout and "accuracy after training, grpo" in done.stdout


@pytest.mark.slow
def test_a_part_that_fails_is_recorded_and_the_next_one_runs(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "no such model"}')
    done, found = make_gpu("--tiny", "--out", str(tmp_path), "--only", "train,head", "--model", str(model))
    assert done.returncode == 1
    assert [(part["part"], part["outcome"]) for part in found["parts"]] == [("head", "done"), ("train", "failed")]
    (error,) = [row for row in found["rows"] if "error" in row]
    assert error["part"] == "train" and "Error: " in error["error"] and "Traceback" in error["where"]


def test_a_part_that_hangs_is_ended(modules, tmp_path, monkeypatch):
    monkeypatch.setattr(modules.main, "GRACE", -9.5)
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--out", str(tmp_path)])
    ended = modules.main.one(modules.main.options(), "head", 10.0, "cpu")
    assert ended["outcome"] == "stopped"
    assert modules.main.one(modules.main.options(), "head", 3.0, "cpu")["outcome"] == "left out"


def test_without_a_gpu_the_sizes_of_a_gpu_are_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done, found = make_gpu("--out", str(tmp_path))
    assert done.returncode == 2 and "--tiny" in done.stderr and found is None


# ---- the sampler and the loop ----


@pytest.fixture(scope="module")
def trainer(modules, folder):
    return modules.train.Trainer(str(folder), modules.train.TINY)


def test_the_sampler_has_the_log_probs_of_transformers(modules, trainer):
    """In float32, with prompts of different lengths; texts that end early included."""
    task, model = trainer.task, trainer.model
    widths = task.attended.sum(1)
    pick = [int(widths.argmin()), int(widths.argmax()), 3, 7]
    assert widths.min() < widths.max()
    decoder = modules.decoder.Decoder(model, 12, task.ids.shape[1] + 20, torch.float32)
    sample = decoder.sample(model, task.ids[pick], task.attended[pick], 3, 20, eos=5, pad=0, seed=1)
    assert sample.mask.any(1).all() and not sample.mask.all()
    ids, attended = (x[pick].repeat_interleave(3, 0) for x in (task.ids, task.attended))
    for row in range(12):  # one by one and without padding: the oracle
        n, kept = int(sample.mask[row].sum()), attended[row] != 0
        text = torch.cat([ids[row][kept], sample.tokens[row, :n]])[None]
        with torch.no_grad():
            logp = model(input_ids=text).logits[0].log_softmax(-1)
        want = logp[-n - 1 : -1].gather(-1, sample.tokens[row, :n, None])[:, 0]
        torch.testing.assert_close(sample.logprobs[row, :n], want, rtol=1e-4, atol=1e-4)
        ended = (sample.tokens[row] == 5).nonzero()
        assert n == (int(ended[0]) + 1 if len(ended) else 20)
        assert (sample.logprobs[row, n:] == 0).all() and (sample.tokens[row, n:] == 0).all()


def test_the_sampler_draws_from_the_distribution(modules, trainer):
    task, model = trainer.task, trainer.model
    decoder = modules.decoder.Decoder(model, 4000, task.ids.shape[1] + 1, torch.float32)
    sample = decoder.sample(model, task.ids[:1], task.attended[:1], 4000, 1, eos=0, pad=0, seed=3)
    with torch.no_grad():
        kept = task.attended[0] != 0
        p = model(input_ids=task.ids[:1, kept]).logits[0, -1].softmax(-1)
    seen = torch.bincount(sample.tokens[:, 0], minlength=len(p)) / 4000
    assert ((seen - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-4).all()


def test_the_sampler_refuses_what_it_cannot_read(modules, trainer):
    with pytest.raises(ValueError, match="room for 16 rows"):
        trainer.decoder.sample(trainer.model, trainer.task.ids[:2], trainer.task.attended[:2], 3, 3, 0, 0, 1)
    config = type("Config", (), {"model_type": "gpt2"})()
    with pytest.raises(ValueError, match="Llama"):
        modules.decoder.Decoder(type("Model", (), {"config": config})(), 1, 1)


@pytest.mark.slow
def test_the_loop_learns(modules, trainer, tmp_path):
    """To write a digit, which is right in a toy's vocabulary."""
    part = modules.measure.Part("train", True, 1e18, tmp_path / "rows.jsonl")
    for arm in ("bandpo-kl", "grpo"):
        run = trainer.train(arm, 0, 1e-2, 12, part)
        assert sum(run["curve"][-3:]) / 3 > sum(run["curve"][:3]) / 3 + 0.2, run["curve"]
        assert run["mismatch"] < 0.1 and 0 <= run["clip_fraction"] < 1
    again = trainer.train("grpo", 0, 1e-2, 2, part)
    assert again["curve"] == run["curve"][:2]  # each run begins with the same weights and random numbers
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


def test_sign_flips_are_counted(modules):
    gaps = [0.3, 0.1, -0.2, 0.4]
    totals = [
        abs(sum(s * x for s, x in zip(signs, gaps, strict=True))) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert modules.train.sign_flip(gaps) == pytest.approx(sum(t >= abs(sum(gaps)) - 1e-12 for t in totals) / 16)
    assert modules.train.sign_flip([0.1, 0.2, 0.3]) == 0.25  # the least that three pairs can show
    assert modules.train.sign_flip([0.1] * 20) < 0.001


def test_answers_are_scored_by_their_last_number(modules):
    score = modules.train.score
    assert score("31 + 6 = 37", "37") == 1 == score("-4", "-4")
    assert score("37 or 38", "37") == 0 == score("no number", "*")


# ---- timing ----


def test_ratios_are_those_of_the_rounds(modules):
    t = modules.measure.Seconds({"a": [2.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]})
    assert t.ratio("a", "b") == 2 and t["b"] == 2
    assert t.quartiles("a", "b") == [2.0, 2.5]


def test_rows_are_flushed_and_a_tiny_size_judges_only_what_is_exact(modules, tmp_path):
    part = modules.measure.Part("loss", True, 0.0, tmp_path / "rows.jsonl")
    part.row("a time", 9.0, "x", "<= 1")
    part.row("a count", 1, "", "<= 0", exact=True, more=float("nan"))
    part.row("nothing", None, "", "<= 1")
    first, second, third = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (first["met"], second["met"], second["more"], third["met"]) == ("", "no", None, "")
    assert part._replace(tiny=False).row("a time", 9.0, "x", "<= 1") is None
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[-1])["met"] == "no"


# ---- the page ----


@pytest.fixture
def page():
    spec = importlib.util.spec_from_file_location("performance", ROOT / "tools" / "performance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_a_record_of_a_gpu(page, tmp_path):
    assert "Not measured yet" in page.cuda(tmp_path / "gpu.json")
    machine = {
        "tiny": False, "device": "cuda", "card": "NVIDIA H100", "driver": "580", "cuda": "13.0", "torch": "2.11",
        "triton": "3.6",
        "commit": "0123456789abcdef", "date": "2026-12-01",
    }  # fmt: skip
    row = {"part": "loss", "what": "a / b", "value": 1.2, "unit": "x", "aim": "<= 1.05", "met": "no", "note": ""}
    parts = [
        {"part": "loss", "outcome": "done", "reason": ""}, {"part": "head", "outcome": "stopped", "reason": "it did not end"},
    ]  # fmt: skip
    rows = [
        row,
        {**row, "what": "left", "value": None, "note": "no time"},
        {"part": "loss", "error": "x", "where": "y"},
    ]
    record = {"machine": machine, "parts": parts, "rows": rows}
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    text = page.cuda(tmp_path / "gpu.json")
    assert "NVIDIA H100" in text and "| a / b | 1.2 times | at most 1.05: **missed** |" in text
    assert "| left | no time |" in text and "stopped: it did not end" in text and "No rows." in text
    (tmp_path / "gpu.json").write_text(json.dumps({**record, "machine": {**machine, "tiny": True}}))
    with pytest.raises(ValueError, match="tiny size"):
        page.cuda(tmp_path / "gpu.json")


def test_the_commands_for_a_lent_machine_are_short_enough():
    text = (GPU / "README.md").read_text(encoding="utf-8")
    blocks = text.split("```bash\n")[1:]
    assert len(blocks) == 4 and all(len(block.split("```")[0]) <= 2000 for block in blocks)
