"""Files that are read: configurations, logs, batches, datasets; and the page that is written."""

import dataclasses
import json
import math
import os
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
import yaml
from arguments import refused, shapes
from hypothesis import strategies as st

from bandpo._system.files import SEAL, damage, read_jsonl, read_yaml, seal
from bandpo.doctor import Setup, examine_batch, examine_log, examine_setup
from bandpo.doctor.batch import NAMES as BATCH_NAMES
from bandpo.doctor.verl import DEFAULTS, read_verl
from bandpo.monitoring.symptoms import NAMES as LOG_NAMES

PLACE = Path(tempfile.mkdtemp(prefix="bandpo-fuzz-"))


# ---- files

yamlish = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(st.text(max_size=5), x, max_size=3)),
    max_leaves=8,
)
tags = st.sampled_from(
    [
        b"!!python/object/apply:os.system ['touch pwned']",
        b"!!python/name:os.system ",
        b"&a [*a, *a]",
        b"<<: 1",
        b"? ",
        b"2024-13-45",
        b"---\n---\n",
        b"\x00",
        b"\xff\xfe",
        b"%YAML 9.9\n",
        b"!!binary x",
        b"[" * 2000,
        b"{a: " * 500,
    ]
)
yaml_bytes = st.one_of(
    st.binary(max_size=40),
    yamlish.map(lambda x: yaml.safe_dump(x).encode()),
    st.tuples(yamlish.map(lambda x: yaml.safe_dump(x).encode()), st.integers(0, 60), tags).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :]
    ),
)


def written(data: bytes, suffix: str) -> Path:
    path = PLACE / f"{os.getpid()}{suffix}"
    path.write_bytes(data)
    return path


def any_yaml(data: bytes) -> str:
    outcome = refused(lambda: read_yaml(written(data, ".yaml")))
    assert not Path("pwned").exists()
    return outcome


json_lines = st.lists(
    st.one_of(
        st.binary(max_size=20),
        yamlish.map(lambda x: json.dumps(x).encode()),
        st.just(b'{"a": 1}'),
        st.just(b"[" * 3000),
    ),
    max_size=4,
).map(b"\n".join)


def any_jsonl(data: bytes) -> str:
    rows: list[Any] = []
    outcome = refused(lambda: rows.extend(read_jsonl(written(data, ".jsonl"))))
    assert all(isinstance(row, dict) for row in rows)
    return outcome


override_value = st.one_of(
    st.integers(-5, 10**6),
    st.floats(),
    st.text(max_size=6),
    st.booleans(),
    st.just("${data.train_batch_size}"),
    st.just("[1"),
)
overrides = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(
                [
                    *DEFAULTS,
                    "actor_rollout_ref.actor.policy_loss.radius",
                    "actor_rollout_ref.actor.policy_loss._target_",
                ]
            ),
            st.text(max_size=8),
        ),
        override_value,
    ),
    min_size=1,
    max_size=4,
).map(lambda pairs: " ".join(f"+{k}={v}" for k, v in pairs).encode(errors="replace"))


def any_overrides(data: bytes) -> str:
    found: list[Setup] = []
    outcome = refused(lambda: found.append(read_verl(written(data, ".txt"))))
    for setup in found:
        assert json.dumps([dataclasses.asdict(f) for f in examine_setup(setup)])
    return outcome


log_value = st.one_of(
    st.floats(),
    st.integers(-10, 10),
    st.none(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.booleans(),
)
LOGS = st.lists(
    st.dictionaries(st.sampled_from([n for names in LOG_NAMES.values() for n in names]), log_value, max_size=6),
    max_size=12,
)


def any_log(rows: list[dict[str, Any]]) -> str:
    return refused(lambda: [dataclasses.asdict(f) for f in examine_log(rows)])


tensors = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.one_of(st.just((2, 3)), st.just((2,)), shapes),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]),
    st.one_of(st.floats(-5, 0), st.sampled_from([math.nan, -math.inf, 3.0])),
)
BATCHES = st.dictionaries(st.sampled_from(list(BATCH_NAMES)), tensors, min_size=1, max_size=5)


def any_saved_batch(batch: dict[str, torch.Tensor]) -> str:
    return refused(lambda: [dataclasses.asdict(f) for f in examine_batch(batch)])


def any_damage(draw: tuple[bytes, int, int]) -> str:
    """A sealed file that was changed in one byte, or cut, is never taken for whole."""
    content, place, value = draw
    folder = PLACE / f"sealed-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / SEAL).unlink(missing_ok=True)
    (folder / "data").write_bytes(content)
    seal(folder)
    assert damage(folder) is None
    changed = bytearray(content)
    if value < 256 and changed[place % len(changed)] != value:
        changed[place % len(changed)] = value
    else:
        changed = changed[: place % len(changed)]
    (folder / "data").write_bytes(bytes(changed))
    assert damage(folder) is not None
    return "refused"


class Tags(HTMLParser):
    """Counts what could act in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.active: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "img", "base", "form") or any(
            k.startswith("on") for k, _ in attributes
        ):
            self.active.append(tag)


attacks = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "<script>alert(1)</script>",
            "<img src=x onerror=alert(1)>",
            "</code><script>",
            "{{ 7*7 }}",
            "{% raw %}",
            '"><svg onload=alert(1)>',
            "javascript:alert(1)",
            "]]>",
            "&lt;script&gt;",
            "\x00",
            "\ud7ff",
            "<!--",
            "<![CDATA[",
        ]
    ),
)


def any_report(draw: tuple[list[str], str]) -> str:
    """Whatever models write, a report's page has no element that acts."""
    from bandpo.train.report import write_report

    texts_, title = draw
    folder = PLACE / f"report-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    rows = [
        {"stage": s, "prompt": t, "completions": [t], "rewards": [1.0]} for s in ("before", "after") for t in texts_
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    numbers = {title: 0.5}
    (folder / "evaluation.json").write_text(
        json.dumps({"before": numbers, "after": numbers, "prompts": 1, "samples": 1, "temperature": 1.0})
    )
    (folder / "config.yaml").write_text(yaml.safe_dump({"objective": title}))
    (folder / "env.json").write_text(
        json.dumps({"command": title, "versions": {"bandpo": "0"}, "seconds": 1.0, "device": "cpu"})
    )
    page = write_report(folder, title=title, figures={}).read_text()
    tags_ = Tags()
    tags_.feed(page)
    assert not tags_.active, tags_.active
    return "refused"


def any_dataset(data: bytes) -> str:
    """Mutated JSONL and CSV files are read, or refused in words; no row without a prompt and an answer passes."""
    import datasets

    from bandpo.train.data import load_prompts

    datasets.disable_progress_bars()
    suffix = ".csv" if data[:1] == b"," else ".jsonl"
    found: list[Any] = []
    common: dict[str, Any] = {
        "config": None,
        "split": "train",
        "prompt_column": "prompt",
        "answer_column": "answer",
        "system_prompt": None,
    }
    path = PLACE / f"{os.getpid()}-{abs(hash(data))}{suffix}"
    path.write_bytes(data)
    try:
        outcome = refused(lambda: found.append(load_prompts(str(path), chat=False, **common)))
    finally:
        path.unlink()
    for rows in found:
        assert all(row["prompt"] and row["answer"] is not None and row["answer"] != "" for row in rows)
    return outcome


row_value = st.one_of(
    st.text(max_size=6),
    st.none(),
    st.integers(),
    st.lists(st.integers(), max_size=2),
    st.just([{"role": "user", "content": "hi"}]),
)
DATASETS = st.one_of(
    st.lists(st.dictionaries(st.sampled_from(["prompt", "answer", "x"]), row_value, max_size=3), max_size=3).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    ),
    st.binary(max_size=30),
    st.binary(max_size=30).map(lambda b: b"," + b),
    st.tuples(
        st.just(b'{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n'),
        st.integers(0, 60),
        st.binary(max_size=3),
    ).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :]),
)


def bad_options(draw: tuple[str, Any]) -> str:
    """A configuration of `bandpo train` with one key that is unknown or has a value that cannot be."""
    from bandpo.train.config import parse

    key, value = draw
    path = written(
        yaml.safe_dump({"task": "countdown", "use_cpu": True, "bf16": False, key: value}).encode(), "-options.yaml"
    )
    return refused(lambda: parse(["--config", str(path)]))


BAD_OPTIONS = st.one_of(
    st.tuples(st.text("abcdefghij_", min_size=3, max_size=12), st.integers()),
    st.tuples(
        st.just("radius"),
        st.one_of(
            st.floats(max_value=0), st.sampled_from([math.nan, math.inf]), st.text("abc", min_size=1, max_size=4)
        ),
    ),
    st.tuples(
        st.sampled_from(["task", "objective", "method", "divergence", "radius_schedule", "loss_type", "reward_errors"]),
        st.text("abcxyz", min_size=1, max_size=9),
    ),
    st.tuples(
        st.sampled_from(["eval_prompts", "eval_samples", "warm_up_steps", "lora_rank", "dynamic_sampling"]),
        st.integers(max_value=-1),
    ),
    st.tuples(
        st.just("pruning"),
        st.one_of(
            st.text("abc{", min_size=1, max_size=5),
            st.dictionaries(st.text("xyz", min_size=1, max_size=3), st.floats(), min_size=1, max_size=2),
        ),
    ),
)


def any_completion(draw: tuple[str, str]) -> str:
    """Whatever is written as an answer, a task's score is 0 or 1, and 1 for no answer with letters."""
    from bandpo.toy.tasks import TASKS, make_splits, score

    task, text = draw
    if task not in _ROWS:
        _ROWS[task] = make_splits(TASKS[task], 4)[1][0]["metadata"]
    value = score(task, text, _ROWS[task])
    assert value in (0, 1)
    assert value == 0 or text.strip()
    return "refused" if value == 0 else "fine"


_ROWS: dict[str, str] = {}
COMPLETIONS = st.tuples(
    st.sampled_from(["countdown", "chain_sum", "letter_counting"]),
    st.one_of(
        st.text("0123456789+-*/() .e_", max_size=16), st.text(max_size=12), st.just("9" * 5000), st.just("(" * 500)
    ),
)
