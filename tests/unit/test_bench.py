"""The record of `make bench`, the comparison with it, and the page made from it."""

import ast
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
FILES = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


record = module(BENCHMARKS / "record.py")
performance = module(ROOT / "tools" / "performance.py")
RECORDS = sorted(record.BASELINES.glob("*.json"))


def row(what="a / b", value=1.0, unit="x", target="", **more):
    met = {True: "yes", False: "no", None: ""}[record.is_met(value, target)]
    about = {"test": "test_it", "date": "2026-01-01", "torch": "2.6"}
    return {"what": what, "value": value, "unit": unit, "target": target, "met": met, "note": "", **about, **more}


# ---- what became worse ----


def test_a_target_is_a_comparison_and_a_number():
    assert record.is_met(1.2, "<= 1.2") and not record.is_met(1.21, "<= 1.2")
    assert record.is_met(30.0, ">= 30") and not record.is_met(29.9, ">= 30")
    assert record.is_met(1.0, "") is None
    with pytest.raises(ValueError, match="must begin with <= or >="):
        record.is_met(1.0, "< 2")


@pytest.mark.parametrize(
    ("now", "before", "worse"),
    [
        (row(value=1.9), row(), "WORSE"),  # beyond the factor of a ratio
        (row(value=1.7), row(), ""),
        (row(value=0.5), row(), ""),  # it became better
        (row(value=0.5, better="higher"), row(), "WORSE"),
        (row(value=10, target=">= 30"), row(value=40), "WORSE"),
        (row(value=60, target=">= 30"), row(value=40), ""),
        (row(value=1.6, quartiles=[1.5, 1.7]), row(quartiles=[0.9, 1.1]), "WORSE"),  # paired rounds allow less
        (row(value=1.6, quartiles=[1.05, 1.9]), row(quartiles=[0.9, 1.1]), ""),  # unless their spreads meet
        (row(value=18, better="higher", quartiles=[17, 19]), row(value=30, quartiles=[29, 31]), "WORSE"),
        (row(value=18, better="higher", quartiles=[15, 30]), row(value=30, quartiles=[29, 31]), ""),
        (row(value=81, unit="", exact=True), row(value=76, unit=""), "WORSE"),
        (row(value=79, unit="", exact=True), row(value=76, unit=""), ""),
        (row(value=1.1, exact=True), row(), "WORSE"),
        (row(value=1.9, unit="s"), row(unit="s"), ""),
        (row(value=2.1, unit="s"), row(unit="s"), "WORSE"),
        (row(value=1.3, unit="exponent"), row(unit="exponent"), "WORSE"),
        (row(value=0.5, unit="exponent", better="higher"), row(unit="exponent"), "WORSE"),
        (row(value=0.2, unit="%"), row(value=-0.1, unit="%"), ""),
        (row(value=3.0, unit="%"), row(value=0.1, unit="%"), "WORSE"),
        (row(growth=1.4), row(growth=1.0), "GROWS FASTER"),
        (row(growth=1.1), row(growth=1.0), ""),
        (row(value=0.0), row(), ""),
        (row(value=9.0, unit="s"), row(unit="x"), ""),  # another measure now
        (row(value=9.0), None, ""),
    ],
)
def test_what_counts_as_worse(now, before, worse):
    assert record.change(now, before).worse == worse


@pytest.mark.parametrize(
    ("now", "before", "found"),
    [
        (row(value=3.1), row(), True),
        (row(value=2.9), row(), False),  # worse, but no regression
        (row(value=0.2), row(), False),
        (row(value=0.3, better="higher"), row(), True),
        (row(value=10, target=">= 30"), row(value=40), True),
        (row(value=9.0, unit="s"), row(unit="s"), False),  # times tell nothing
        (row(value=9.0, unit="ns/token"), row(unit="ns/token"), False),
        (row(value=9.0, unit="", exact=True), row(unit=""), False),
        (row(value=1.6, unit="exponent"), row(unit="exponent"), True),
        (row(value=1.4, unit="exponent"), row(unit="exponent"), False),
        (row(growth=1.6), row(growth=1.0), True),
        (row(growth=1.4), row(growth=1.0), False),
        (row(value=4.0, quartiles=[1.0, 9.0]), row(quartiles=[0.9, 1.1]), False),  # the rounds do not agree
        (row(value=4.0, quartiles=[3.0, 9.0]), row(quartiles=[0.9, 1.1]), True),
        (row(value=9.0), None, False),
        (row(value=9.0, unit="exponent"), row(), False),
        (row(value=0.0), row(), False),
    ],
)
def test_what_counts_as_a_regression(now, before, found):
    assert record.regression(now, before) == ("REGRESSION" if found else "")
    assert not found or record.change(now, before).worse  # a regression is worse by every margin


def test_the_record_of_another_machine_is_the_fullest(tmp_path):
    mine = {"processor": "Mine", "cores": 4}
    assert record.nearest(mine, tmp_path) == tmp_path / "mine-4-cores.json"
    for name, rows in (("a-2-cores", [row("a")]), ("b-8-cores", [row("a"), row("b")])):
        (tmp_path / f"{name}.json").write_text(record.dump({"machine": {}, "files": {"bench_a": rows}}))
    assert record.nearest(mine, tmp_path).stem == "b-8-cores"
    (tmp_path / "mine-4-cores.json").write_text(record.dump({"machine": {}, "files": {"bench_a": [row("a")]}}))
    assert record.nearest(mine, tmp_path).stem == "mine-4-cores"


def test_the_change_is_now_over_before():
    assert record.change(row(value=3.0), row(value=2.0)).ratio == 1.5
    assert record.change(row(value=3.0), None).ratio is None


def test_growth_is_the_slope():
    assert record.growth([1, 10, 100], [2, 200, 20_000]) == pytest.approx(2)
    assert record.growth([5], [1.0]) is None


# ---- the record ----


def test_files_that_did_not_run_keep_their_rows():
    old = {"machine": {}, "files": {"bench_a": [row("a")], "bench_b": [row("b"), row("gone", test="test_gone")]}}
    new = record.merged(old, {"cores": 2}, {"bench_b": [row("b", value=7.0)]}, {"bench_b": ["test_it"]})
    assert new["files"] == {"bench_a": [row("a")], "bench_b": [row("b", value=7.0)]}
    assert old["files"]["bench_b"][0]["value"] == 1.0  # and the old one is what it was


def test_a_part_of_a_file_replaces_the_rows_of_its_tests():
    old = {"files": {"bench_a": [row("a"), row("a2"), row("other", test="test_other")]}}
    new = record.merged(old, {}, {"bench_a": [row("a", value=3.0)]}, {})
    assert [(r["what"], r["value"]) for r in new["files"]["bench_a"]] == [("other", 1.0), ("a", 3.0)]
    # in the order of the tests, where all are known; a test that failed keeps its old row
    new = record.merged(new, {}, {}, {"bench_a": ["test_it", "test_other"]})
    assert [r["what"] for r in new["files"]["bench_a"]] == ["a", "other"]


def test_a_record_is_read_as_it_was_written(tmp_path):
    found = {
        "machine": {"processor": "x"},
        "files": {"bench_a": [row("é"), row("b", sizes=[1, 2])], "bench_b": [row("c")]},
    }
    text = record.dump(found)
    assert json.loads(text) == found
    assert sum(line.startswith("  {") for line in text.splitlines()) == 3  # a line for each row
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.dump({"machine": {}, "files": {"bench_a": [row(value=math.nan)]}})
    assert record.load(tmp_path / "none.json") == {"machine": {}, "files": {}}


def test_the_kind_of_a_machine_is_a_file_name():
    assert record.kind({"processor": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 8}) == "intel-xeon-cpu-2-20ghz-8-cores"


def reporting(name):
    """The tests of a benchmark file that write rows; one that runs only where it is asked for belongs to the record as well."""
    tree = ast.parse((BENCHMARKS / f"{name}.py").read_text())
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and {"report", "compare"} & {argument.arg for argument in node.args.args}
    }


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_committed_record_is_complete_and_true(path):
    """If it fails: `make bench ARGS=--update`, or one file of it, then `python tools/performance.py`."""
    found = record.load(path)
    assert record.kind(found["machine"]) == path.stem
    rows = [r for rows in found["files"].values() for r in rows]
    assert len({r["what"] for r in rows}) == len(rows)
    for name, rows in found["files"].items():
        assert {r["test"].partition("[")[0] for r in rows} == reporting(name), name
        for r in rows:
            assert r["met"] == {True: "yes", False: "no", None: ""}[record.is_met(r["value"], r["target"])], r["what"]
            assert r.keys() >= {"what", "value", "unit", "target", "met", "note", "test", "date", "torch"}, r["what"]
            if "quartiles" in r:
                assert r["quartiles"][0] <= r["value"] * 1.001 and r["value"] <= r["quartiles"][1] * 1.001, r["what"]
            if "ratios" in r:
                assert len(r["ratios"]) == len(r["sizes"]) >= 3, r["what"]
            assert r["date"] <= "2100" and len(r["date"]) == 10


def test_a_record_has_every_file():
    assert RECORDS
    complete = [path for path in RECORDS if sorted(record.load(path)["files"]) == FILES]
    assert complete, f"no record has all of {FILES}"


# ---- the page ----


def test_the_page_is_made_from_the_record(monkeypatch, capsys, tmp_path):
    """If it fails: `python tools/performance.py`."""
    text = performance.page(performance.TEXT.read_text(), performance.chosen())
    assert performance.PAGE.read_text() == text
    monkeypatch.setattr(sys, "argv", ["performance.py", "--check"])
    assert performance.main() == 0
    monkeypatch.setattr(performance, "PAGE", tmp_path / "page.md")
    assert performance.main() == 1 and "out of date" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["performance.py"])
    assert performance.main() == 0 and (tmp_path / "page.md").read_text() == text


def test_no_number_of_the_page_is_typed_by_hand():
    assert performance.typed(performance.TEXT.read_text()) == []
    prose = performance._TABLE.sub("", performance.TEXT.read_text()).splitlines()
    assert max(map(len, prose)) <= performance.WIDTH  # a longer one is broken alone, with a word or two left over
    assert performance.typed("It takes 3.5 ns, 12%, 7 times\n<!-- table x\nto 16 s\n-->") == [
        "3.5 ns",
        "12%",
        "7 times",
    ]


def test_no_row_is_left_out():
    found, seen = performance.chosen(), []
    named = {name for match in performance._TABLE.finditer(performance.TEXT.read_text()) for name in match[1].split()}
    for match in performance._TABLE.finditer(performance.TEXT.read_text()):
        rows = [r for name in match[1].split() for r in found["files"].get(name, [])]
        seen += [r["what"] for line in performance._lines(rows, match[2]) for r in line.rows]
    others = [r["what"] for name, rows in found["files"].items() if name not in named for r in rows]
    assert sorted(seen + others) == sorted(r["what"] for rows in found["files"].values() for r in rows)


def test_the_page_says_what_is_missed_and_what_grows():
    rows = [
        row("a, one", 3.0, target="<= 1.2", growth=1.0, quartiles=[2.9, 3.1]),
        row("b, one", 250.0, target=">= 200"),
        row("b, two", 150.0, target=">= 200"),
        row("c", 1.5, growth=1.6, equivalent_growth=1.0, sizes=[1, 2], ratios=[1.2, 1.5], equivalent="a loop"),
        row("d", 1.5, growth=1.6, equivalent_growth=1.6),
    ]
    machine = {"processor": "P", "cores": 2, "python": "3.11"}
    text = "{{machine}}\n{{missed}}\n{{faster}}\n<!-- table bench_a\nb, * => all of b\n*\n-->\n"
    text += "<!-- table bench_z -->\n<!-- others -->\n\n"
    page = performance.page(text, {"machine": machine, "files": {"bench_a": rows, "bench_new": [row("e")]}})
    assert "2 of the 3 rows with an aim miss it" in page
    assert "| all of b | 150 to 250 times | at least 200: **missed** by 1 of 2 |  |" in page
    assert "| a, one | 3 times (2.9 to 3.1) | at most 1.2: **missed** | 1 |" in page
    assert "* c: growth 1.6, beside 1 of its equivalent." in page and "* d: growth" not in page
    assert "* c: 1.2 at 1, 1.5 at 2, beside a loop." in page
    assert "## New" in page and "| e |" in page and "*Not measured for this record.*" in page
    with pytest.raises(ValueError, match="no pattern has the row 'a, one'"):
        performance.page("<!-- table bench_a\nb*\n-->", {"machine": machine, "files": {"bench_a": rows}})


def test_the_doctor_knows_the_measured_memory():
    """The memory of `token_logprobs` and of the plain path, at 4096 tokens x 151936 words."""
    from bandpo.doctor import rules

    rows = [r for r in performance.chosen()["files"]["bench_token_logprobs"] if "memory" in r["what"]]
    assert any(r["value"] == pytest.approx(rules._CHUNKED, rel=0.25) for r in rows), [r["value"] for r in rows]
    plain = [float(x) for r in rows for x in re.findall(r"against ([\d.]+) GiB", r["note"])]
    logits = 4096 * 151_936 * 4 / 2**30
    assert any(x / logits == pytest.approx(rules._PLAIN, rel=0.25) for x in plain), plain


# ---- the runs ----


def run(folder, *arguments):
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += [
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
        "-o",
        "python_files=bench_*.py",
        "-o",
        f"pythonpath={folder}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=environment, timeout=600
    )


@pytest.mark.slow
def test_a_run_beside_the_record(tmp_path):
    for name in ("conftest.py", "record.py", "seconds.py"):
        shutil.copy(BENCHMARKS / name, tmp_path)
    (tmp_path / "bench_x.py").write_text(
        "import time\n"
        "def work(size):\n    return lambda: sum(range(size))\n"
        "def test_it(compare, report):\n"
        "    compare('sums', lambda n: {'ours': work(2 * n), 'half': work(n)}, [1000, 4000, 16000], target='<= 9', at=4000)\n"
        "    report('count', 10, '', exact=True)\n"
        "def test_bad(report):\n    report('bad', 1.0, 'x')\n    assert False\n"
    )
    out = run(tmp_path, "--update")
    assert out.returncode == 1, out.stderr  # of the test that fails, and the rest is recorded
    (path,) = (tmp_path / "baselines").glob("*.json")
    rows = record.load(path)["files"]["bench_x"]
    assert [r["what"] for r in rows] == ["sums", "count"]
    assert 1 < rows[0]["value"] < 4 and rows[0]["at"] == 4000 and rows[0]["met"] == "yes"
    assert 0.5 < rows[0]["growth"] < 1.5 and rows[0]["quartiles"][0] <= rows[0]["quartiles"][1]
    before = path.read_text()
    path.write_text(before.replace('"count", "value": 10', '"count", "value": 5'))
    out = run(tmp_path, "bench_x.py", "-k", "test_it", "--json=found.json", "--fail-on-worse")
    assert out.returncode == 1, out.stdout
    assert "WORSE" in out.stdout and "2.00" in out.stdout and "1 worse than before, 0 of them regressions" in out.stdout
    path.write_text(re.sub(r'("sums", "value": )[\d.]+', r"\g<1>0.01", re.sub(r'"quartiles": \S+ \S+ ', "", before)))
    out = run(tmp_path, "bench_x.py", "-k", "test_it")  # without an option: a ratio that is a hundred times worse
    assert out.returncode == 1 and "REGRESSION" in out.stdout and "1 of them regressions" in out.stdout, out.stdout
    path.rename(path.with_name("other-9-cores.json"))
    out = run(tmp_path, "bench_x.py", "-k", "test_it")
    assert out.returncode == 1 and "of another kind of machine: ratios alone are compared" in out.stdout
    assert not re.search(r"^count .* WORSE", out.stdout, re.MULTILINE)
    path.with_name("other-9-cores.json").rename(path)
    assert len(record.load(tmp_path / "found.json")["files"]["bench_x"]) == 2
    out = run(tmp_path, "--update", "--quick")
    assert out.returncode != 0 and "leave out --quick" in out.stderr


@pytest.mark.slow
def test_every_benchmark_still_runs():
    """With the smallest sizes, and nothing compiled."""
    out = run(BENCHMARKS, str(BENCHMARKS), "--quick")
    assert out.returncode == 0, out.stdout[-3000:]
    assert "policy_loss grpo, eager" in out.stdout and "ratio_bounds compiled, KL" in out.stdout
