"""What the doctor prints: order, width, JSON by its schema, the page, and exit statuses; and `examine` for everything."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

from bandpo import OBJECTIVES
from bandpo.cli import main
from bandpo.doctor import Finding, examine, examine_batch, examine_log, examine_setup
from bandpo.doctor.output import Examined, as_json, as_page, as_text, exit_status, schema, worst_first
from bandpo.integrations.trl import BandGRPOConfig
from doctor_cases import GOOD, batch, log

SICK = {"entropy": 0.5, "grad_norm": 0.0, "frac_reward_zero_std": 1.0}
EVIL = "<script>alert(1)</script>\x1b[31m https://user:password@host/?token=abc 'quoted' & \u202e"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_the_worst_is_first_and_nothing_is_lost():
    findings = examine_log(log(n=20, **SICK))
    levels = [f.level for f in worst_first(findings)]
    assert levels == sorted(levels, key=["problem", "warning", "note", "ok"].index)
    assert sorted(map(id, findings)) == sorted(map(id, worst_first(findings)))
    text = as_text([Examined("log", tuple(findings))])
    marks = re.findall(r"^ (!!|\?\?|--|ok) ", text, re.MULTILINE)
    assert marks == sorted(marks, key=["!!", "??", "--", "ok"].index)
    assert marks[0] == "!!" and len(marks) == len(findings)


@pytest.mark.parametrize("width", [20, 40, 72, 120, 500])
def test_lines_are_as_wide_as_the_terminal(width):
    one = Examined("log", (Finding("inert", "problem", "seen " * 60, "cause " * 60, "knob " * 60),))
    longest = max(map(len, as_text([one], width=width).splitlines()))
    assert longest <= min(max(width, 40), 120)
    assert longest > 0.8 * min(max(width, 40), 120)


def test_the_command_takes_the_width_of_the_terminal(monkeypatch, capsys):
    write("m.jsonl", log(n=20, **SICK))
    for columns in ("50", "110"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["doctor", "m.jsonl"]) == 1
        assert 0.7 * int(columns) < max(map(len, capsys.readouterr().out.splitlines())) <= int(columns)


def test_json_is_by_its_schema(capsys):
    jsonschema.Draft202012Validator.check_schema(schema())
    save_file({k: v.float() if v.is_floating_point() else v for k, v in batch().items()}, "b.safetensors")
    write("m.jsonl", log(n=20, **SICK))
    Path("c.yaml").write_text("objective: bandpo-kl\nper_device_train_batch_size: 8\n")
    Path("bad.jsonl").write_text("[]\n")
    assert main(["doctor", "c.yaml", "m.jsonl", "b.safetensors", "bad.jsonl", "--json"]) == 2
    out, error = capsys.readouterr()
    found = json.loads(out)
    jsonschema.validate(found, schema())
    assert [section["file"].split(" ")[0] for section in found] == ["c.yaml", "m.jsonl", "b.safetensors", "bad.jsonl"]
    assert "a row is an object" in found[3]["error"] and found[3]["findings"] == []
    assert "a row is an object" in error
    entropy = next(f for f in found[1]["findings"] if f["rule"] == "entropy")
    assert entropy["numbers"] == {"start": 0.5, "end": 0.5}
    odd = Examined("x", (Finding("inert", "note", EVIL, numbers={"a": float("nan"), "b": 1}),))
    [section] = json.loads(as_json([odd]))
    jsonschema.validate([section], schema())
    assert section["findings"][0]["numbers"] == {"a": None, "b": 1.0}
    assert "\x1b" not in section["findings"][0]["seen"] and "password" not in section["findings"][0]["seen"]
    for change in ({"schema": 2}, {"findings": [{"rule": "inert"}]}, {"file": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate([section | change], schema())


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_needs_nothing_else():
    examined = [
        Examined(EVIL, (Finding("inert", "problem", EVIL, EVIL, EVIL, details=(EVIL,)), Finding("kl", "ok", "fine"))),
        Examined("other", error=EVIL),
    ]
    text = as_page(examined)
    page = Page(text)
    assert not page.open
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    names = {name for name, _ in page.attributes}
    assert {"src", "href"}.isdisjoint(names) and not any(name.startswith("on") for name in names)
    assert "&lt;script&gt;" in text and "<script>" not in text
    assert "\x1b" not in text and "\u202e" not in text and "password" not in text
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text
    assert text.index(">problem<") < text.index(">ok<")
    assert "not examined" in text and "exit status 2" in text
    assert "about this rule" in text  # of the catalogue


def test_the_page_from_the_command(capsys):
    write("m.jsonl", log(n=20, **SICK))
    assert main(["doctor", "m.jsonl", "--html", "page.html"]) == 1
    assert "no weight moves" in Path("page.html").read_text()
    assert " !! still" in capsys.readouterr().out
    Path("folder").mkdir()
    for target, message in (("folder", "is a folder; name a file"), ("no/page.html", "No such file")):
        assert main(["doctor", "m.jsonl", "--html", target]) == 2
        assert message in capsys.readouterr().err


def test_exit_status(capsys):
    problem, warning = Finding("inert", "problem", "x"), Finding("kl", "warning", "x")
    assert exit_status([Examined("a", (warning,))]) == 0
    assert exit_status([Examined("a", (warning,)), Examined("b", (problem,))]) == 1
    assert exit_status([Examined("a", (problem,)), Examined("b", error="x")]) == 2
    write("sick.jsonl", log(n=20, **SICK))
    write("well.jsonl", log(n=20, entropy=lambda x: 1 - 0.2 * x, grad_norm=lambda x: 1 + x))
    write("bad.jsonl", [{"nothing": 1}])
    assert main(["doctor", "well.jsonl"]) == 0
    assert main(["doctor", "well.jsonl", "sick.jsonl"]) == 1
    capsys.readouterr()
    assert main(["doctor", "bad.jsonl", "sick.jsonl", "missing.jsonl"]) == 2
    out, error = capsys.readouterr()
    assert "sick.jsonl" in out and "no weight moves" in out  # what can be read is told
    assert "none of the metrics" in error and "missing.jsonl: no such file" in error and error.count("\n") == 1


def test_examine_takes_everything():
    sick = log(n=20, **SICK)
    assert examine(sick) == examine(iter(sick)) == examine_log(sick)
    assert examine(GOOD) == examine_setup(GOOD)
    tensors = batch()
    assert examine(tensors) == examine_batch(tensors)
    theirs = {"log_prob": tensors["logprobs"], "old_log_prob": tensors["old_logprobs"],
              "response_mask": tensors["mask"], "advantages": tensors["advantages"], "more": torch.ones(3)}  # fmt: skip
    assert examine(theirs) == examine_batch(tensors)
    write("m.jsonl", sick)
    assert (
        [f.rule for f in examine("m.jsonl")]
        == [f.rule for f in examine(Path("m.jsonl"))]
        == [f.rule for f in examine_log(sick)]
    )
    several = examine(GOOD, sick, tensors)
    assert several == [*examine_setup(GOOD), *examine_log(sick), *examine_batch(tensors, objectives=[GOOD.objective])]
    run = {"objective": "bandpo-kl-upper", "per_device_train_batch_size": 8, "num_iterations": 2}
    own = examine(run, tensors)
    assert any(row.startswith("bandpo-kl-upper ") for f in own if f.rule == "clipping" for row in f.details)
    assert OBJECTIVES["bandpo-kl-upper"]


def test_examine_takes_the_configuration_of_a_trainer():
    config = BandGRPOConfig(
        output_dir="out", objective="grpo", per_device_train_batch_size=8, num_generations=4, use_cpu=True, bf16=False
    )
    assert {f.rule: f.level for f in examine(config)}["inert"] == "problem"
    config = BandGRPOConfig(output_dir="out", per_device_train_batch_size=8, num_iterations=2, use_cpu=True, bf16=False)
    assert {f.rule: f.level for f in examine(config)}["inert"] == "ok"
    with pytest.raises(ValueError, match="actor_rollout_ref"):
        examine({"what": 1})
    verl = {"actor_rollout_ref": {"actor": {"ppo_epochs": 2}}}
    assert {f.rule: f.level for f in examine(verl)}["inert"] == "ok"


def test_what_examine_refuses():
    with pytest.raises(ValueError, match="nothing to examine"):
        examine()
    with pytest.raises(TypeError, match="paths, configurations, rows of metrics and batches of tensors, got int"):
        examine(3)
    with pytest.raises(ValueError, match="row 0 of the log is a mapping from names to numbers, got int"):
        examine([1, 2])
    with pytest.raises(ValueError, match="no such file"):
        examine("missing.jsonl")


def test_help_and_explain_need_no_torch():
    code = ("import sys; from bandpo.cli import main\n"
            "main(['doctor', '--explain', 'inert']); print('torch' in sys.modules)")  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert ran.stdout.rstrip().endswith("False")
