"""Logs, and the report of a long run: read one line at a time, and drawn with a bounded number of points."""

import json
import math
import random
import tracemalloc
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo._system.files import read_jsonl, write_json, write_text
from bandpo._system.jsonl import as_number, keep_rows, lines, number_texts
from bandpo._system.progress import Progress
from bandpo.doctor import examine_log
from bandpo.doctor.logs import read_log
from bandpo.metrics import PROB_BINS
from bandpo.monitoring.symptoms import NAMES, Log
from bandpo.plots import plot_clip_by_probability, plot_training
from bandpo.plots.curves import MOST_POINTS, Curve, Curves
from bandpo.train.progress import TrainingProgress, _is_kept, _is_surely_kept
from bandpo.train.report import write_report

SERIES = ("reward", "entropy", "grad_norm", "clip_ratio/high_mean", "clip_ratio/low_mean", "clip_ratio/region_mean")


def row(i, full=True):
    draw = random.Random(i)
    found = {"step": i, **{name: draw.random() for name in SERIES}}
    for name in PROB_BINS if full else ():
        found[f"token_fraction_by_prob/{name}"] = draw.random()
        found |= {f"clip_fraction_by_prob/{side}/{name}": draw.random() for side in ("low", "high", "any")}
    return found


def written(path, count, every=10, last=""):
    """A log in which one row of `every` has all metrics."""
    texts = [json.dumps(row(i, i % every == 0))[len('{"step": 0') :] for i in range(200)]
    with path.open("w") as file:
        file.writelines(f'{{"step": {i}{texts[i % 200].lstrip("0123456789")}\n' for i in range(count))
        file.write(last)
    return path


# ---- reading

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["nan", " -Inf ", "1", 10**400, -(10**4000)]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4,
)  # fmt: skip
rows_of_any_kind = st.lists(st.dictionaries(st.sampled_from([*SERIES, "x", "é"]), json_values, max_size=6), max_size=6)


def plain(value):
    """What the plain reading says of a value: its number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_any_kind)
def test_texts_of_numbers_are_the_numbers_of_json(rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    with_digits = [{k: v if not isinstance(v, int) or abs(v) < 10**4000 else 1 for k, v in r.items()} for r in rows]
    path.write_text("".join(json.dumps(r) + "\n" for r in with_digits) + '{"unfinished": ')
    found = list(number_texts(path))
    assert [list(r) for r in found] == [list(r) for r in with_digits]
    for ours, theirs in zip(found, with_digits, strict=True):
        for name, value in theirs.items():
            number, expected = as_number(ours[name]), plain(value)
            assert number == expected or (math.isnan(number) and math.isnan(expected))


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_any_kind)
def test_a_log_read_from_its_file_is_the_log_of_its_rows(rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "log.jsonl"
    rows = [{k: v if not isinstance(v, int) or abs(v) < 10**4000 else 1 for k, v in r.items()} for r in rows]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    read, given_ = Log(read_log(path)), Log(rows)
    assert read.rows == given_.rows and read.broken == given_.broken
    assert {k: (n, list(map(repr, v))) for k, (n, v) in read.found.items()} == {
        k: (n, list(map(repr, v))) for k, (n, v) in given_.found.items()
    }
    # the obvious reading: the first name with a number in some row, and its numbers
    for what, names in NAMES.items():
        series = {n: [x for r in rows if (x := _as_log_number(r.get(n))) is not None] for n in names}
        name = next((n for n in names if series[n]), None)
        assert (given_.found[what][0] if what in given_.found else None) == name
        if name is not None:
            assert list(map(repr, given_.found[what][1])) == list(map(repr, series[name]))


def _as_log_number(value):
    if isinstance(value, str) and value.strip().isascii() and "_" not in value:
        try:
            return float(value)
        except ValueError:
            return None
    return plain(value)


def test_a_preferred_name_that_comes_late_is_used_and_the_other_forgotten():
    first, second = NAMES["reward"][:2]
    log = Log([{second: 1.0}, {second: 2.0, first: 3.0}, {first: 4.0}, {second: math.nan}])
    assert (log.found["reward"][0], list(log.found["reward"][1])) == (first, [3.0, 4.0])
    assert log.broken == {second: 1}


def test_memory_does_not_grow_with_the_rows_but_for_eight_bytes_a_value(tmp_path):
    peaks = []
    for count in (1_000, 6_000):
        path = written(tmp_path / "log.jsonl", count)
        tracemalloc.start()
        assert examine_log(read_log(path))
        Curves(number_texts(path))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 5_000 * 300  # bytes; rows as dicts take some thousand each


def test_limits_of_a_log_are_said(tmp_path, monkeypatch):
    path = written(tmp_path / "log.jsonl", 30)
    monkeypatch.setattr("bandpo.monitoring.log_rows.MAX_ROWS", 20)
    with pytest.raises(ValueError, match="has more than 20 rows; examine its end"):
        examine_log(read_log(path))
    monkeypatch.setattr("bandpo.doctor.logs._MAX_LOG_BYTES", 100)
    with pytest.raises(ValueError, match="is too large: it has more than 100 bytes"):
        examine_log(read_log(path))
    monkeypatch.setattr("bandpo.monitoring.symptoms._MOST_BROKEN", 5)
    with pytest.raises(ValueError, match="more than 5 different metrics"):
        examine_log([{f"m{i}": math.nan} for i in range(6)])
    monkeypatch.setattr("bandpo.monitoring.symptoms._SEARCHED", 7)
    with pytest.raises(ValueError, match="the log has 7 or more rows and none of"):
        examine_log({"x": 1} for _ in range(10**9))
    (tmp_path / "long.jsonl").write_text('{"a": "' + "x" * 100 + '"}\n')
    with pytest.raises(ValueError, match=r"line 1 has more than 50 bytes"):
        list(lines(tmp_path / "long.jsonl", longest=50))


# ---- resuming

resumed_lines = st.lists(
    st.one_of(
        st.builds(lambda i, x: json.dumps({"step": i, "loss": x}), st.integers(0, 9), st.floats()),
        st.builds(lambda i: json.dumps({"step": i, "unfinished": True}), st.integers(0, 9)),
        st.builds(lambda i: json.dumps({"step": i, "train_runtime": 1.0}), st.integers(0, 9)),
        st.sampled_from(['{"loss": 1}', '{"loss": 1, "step": 3}', '{"step": "3", "a": 1}', '{"step": 3, "a": "}{"}']),
    ),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(texts=resumed_lines, in_order=st.booleans(), cut=st.booleans(), link=st.booleans())
def test_a_resumed_log_has_the_rows_up_to_the_checkpoint_in_any_order(texts, in_order, cut, link, tmp_path_factory):
    path = tmp_path_factory.mktemp("resumed") / "metrics.jsonl"
    if in_order:
        texts = sorted(
            texts, key=lambda t: json.loads(t).get("step", 0) if isinstance(json.loads(t).get("step"), int) else 0
        )
    target = path.with_name("elsewhere") if link else path
    target.write_text("".join(t + "\n" for t in texts) + '{"step": 1, "lo' * cut)
    if link:
        path.symlink_to(target)
    expected = [t for t in texts if _is_kept(json.loads(t), 5)]
    keep_rows(path, lambda r: _is_kept(r, 5), sure=lambda line: _is_surely_kept(line, 5))
    assert path.read_text() == "".join(t + "\n" for t in expected)
    assert not path.is_symlink()
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".part"] == []


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "loss": 0.{"step": 3, "loss": 1.0}', '{"step": 2, "lo\0\0s": 1}', '{"step": 2, "l']
)
def test_a_torn_line_is_refused_when_a_run_resumes(torn, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 1.0}}\n{torn}\n{{"step": 4, "loss": 1.0}}\n')
    callback = TrainingProgress(Progress(main=False), tmp_path)
    state = SimpleNamespace(is_world_process_zero=True, global_step=5, max_steps=9)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        callback.on_train_begin(None, state, None)


def test_resuming_parses_the_rows_after_the_checkpoint_alone(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr("bandpo._system.jsonl.parse_json", lambda line, where: parsed.append(line) or json.loads(line))
    written(tmp_path / "metrics.jsonl", 1000)
    callback = TrainingProgress(Progress(main=False), tmp_path)
    state = SimpleNamespace(is_world_process_zero=True, global_step=996, max_steps=2000)
    callback.on_train_begin(None, state, None)
    assert len(parsed) == 3
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(997))
    assert (tmp_path / "timings.jsonl").read_text() == ""


# ---- curves and the report


@pytest.mark.parametrize("count", [0, 1, 1999, 2000, 2001, 3999, 4001, 20_000])
def test_a_curve_keeps_both_extremes_of_every_group_and_few_points(count):
    draw = random.Random(count)
    values = [draw.choice([0.0, 1.0, draw.random(), math.nan]) for _ in range(count)]
    curve = Curve()
    for i, y in enumerate(values):
        curve.add(i, y)
    xs, ys = curve.points()
    assert len(xs) <= MOST_POINTS and xs == sorted(xs)
    if count <= MOST_POINTS:
        assert xs == list(range(count)) and list(map(repr, ys)) == list(map(repr, values))
        return
    assert all(values[int(x)] == y for x, y in zip(xs, ys, strict=True))  # true points, none made up
    finite = [(i, y) for i, y in enumerate(values) if math.isfinite(y)]
    width = 1
    while width * MOST_POINTS // 2 < len(finite):
        width *= 2
    for start in range(0, len(finite), width):
        group = [y for _, y in finite[start : start + width]]
        inside = [
            y
            for x, y in zip(xs, ys, strict=True)
            if finite[start][0] <= x <= finite[min(start + width, len(finite)) - 1][0]
        ]
        assert {min(inside), max(inside)} == {min(group), max(group)} and len(inside) <= 2


def test_means_over_a_log_are_over_the_rows_that_have_them():
    rows = [row(i, full=i % 10 == 0) for i in range(100)]
    curves = Curves(rows)
    for name in PROB_BINS:
        shares = [r[f"token_fraction_by_prob/{name}"] for r in rows[::10]]
        assert curves.clipped(None, name) == pytest.approx(sum(shares) / 10)
        high = [r[f"clip_fraction_by_prob/high/{name}"] for r in rows[::10]]
        assert curves.clipped("high", name) == pytest.approx(
            sum(w * v for w, v in zip(shares, high, strict=True)) / sum(shares)
        )
    assert curves.curve("reward").points() == (list(range(100)), [r["reward"] for r in rows])
    assert Curves([]).clipped("low", PROB_BINS[0]) == 0.0


def test_the_report_of_a_long_run_is_small_and_says_what_is_drawn(tmp_path):
    path = written(tmp_path / "metrics.jsonl", 100_000, every=200, last='{"step": 7, "rew')
    curves = Curves(number_texts(path))
    assert curves.rows == 100_000
    samples = [
        {"stage": stage, "prompt": f"{i} " + "p" * 9000, "completions": ["<c>" * 9000] * 9, "rewards": [0.0] * 9}
        for stage in ("before", "after")
        for i in range(30)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    scores = {"mean@4": 0.1, "pass@1": 0.2}
    write_json(
        tmp_path / "evaluation.json",
        {"before": scores, "after": scores, "prompts": 30, "samples": 9, "temperature": 1.0},
    )
    write_json(tmp_path / "env.json", {"command": "x", "versions": {"bandpo": "1"}, "seconds": 1.0, "device": "cpu"})
    write_text(tmp_path / "config.yaml", "a: 1\n")
    figures = {"Training": plot_training(curves), "Who is clipped": plot_clip_by_probability(curves)}
    [said] = [text.get_text() for text in figures["Training"].texts]
    assert said.startswith("100,000 rows: of each curve at most 2,000 points")
    assert all(len(line.get_xdata()) <= MOST_POINTS for axes in figures["Training"].axes for line in axes.lines)
    page = write_report(tmp_path, title="long", figures=figures).read_text()
    assert len(page) < 2_000_000
    assert page.count("more characters in samples.jsonl") == 12 * (1 + 2 * 4)
    short = plot_training([row(i) for i in range(50)])
    assert not short.texts
