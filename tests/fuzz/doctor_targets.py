"""What the doctor reads, fuzzed: any file is read or refused in words, in seconds, and what is read is what is there.

`TARGETS` has for each target the inputs, the check, whether every input is bad, and whether it is slow, as in targets.py.
"""

import dataclasses
import io
import json
import math
import os
import shlex
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from arguments import refused
from hypothesis import strategies as st
from safetensors.torch import save

import bandpo.doctor.trl
import bandpo.train.config  # noqa: F401 (both here, so that no input pays for loading them)
from bandpo._system.bounded import MAX_DEPTH, parse_yaml
from bandpo._system.errors import printable
from bandpo.doctor import (
    examine_batch,
    examine_log,
    examine_setup,
    nemo_rl,
    openrlhf,
    prime_rl,
    rllm,
    skyrl,
    slime,
)
from bandpo.doctor.batch import load_batch
from bandpo.doctor.command import read_config
from bandpo.doctor.logs import read_log
from bandpo.doctor.setup import Setup
from bandpo.doctor.shell import read_script
from bandpo.doctor.verl import read_verl
from shell_scripts import FIRST, check, scripts

PLACE = Path(tempfile.mkdtemp(prefix="bandpo-fuzz-doctor-"))
SECONDS = 2.0


def written(data: bytes, suffix: str) -> Path:
    path = PLACE / f"{os.getpid()}{suffix}"
    path.write_bytes(data)
    return path


def quick(call: Callable[[], object]) -> str:
    """Refused in words, or fine, in either case within seconds of CPU."""
    began = time.process_time()
    outcome = refused(call)
    assert time.process_time() - began < SECONDS
    return outcome


# ---- YAML

scalars = st.sampled_from(
    ["1", "-2.5", "1e-6", "x", "~", "true", "'a b'", '"\\u00e9"', "0x1F", "1_000", "12:30", ".inf", "=", "a: b"]
)
pieces = st.one_of(
    scalars,
    st.sampled_from(
        ["&a ", "*a", "&b ", "*b", "[", "]", "{", "}", ", ", ": ", "\n", "\n  ", "- ", "? ", "<<: ", "<<: *a", "k: ", "k2: ",
         "!!str ", "!!int ", "!!python/name:os.system ", "|\n", "---\n", "# c\n", "\t", "'", '"', "%", "@"]
    ),
)  # fmt: skip


def _level(i: int, width: int, *, merge: bool) -> str:
    """A value that has the one before it many times."""
    inside = "[" + ", ".join([f"*a{i - 1}"] * width) + "]"
    return f"a{i}: &a{i} {{<<: {inside}}}\n" if merge else f"a{i}: &a{i} {inside}\n"


yaml_texts = st.one_of(
    st.lists(pieces, max_size=25).map("".join),
    st.tuples(pieces, st.integers(1, 3000)).map(lambda t: t[0] * t[1]),
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.booleans()).map(
        lambda t: (
            "a0: &a0 {x: 1}\n"
            + "".join(
                f"a{i}: &a{i} {'{<<: ' if t[2] else ''}[{', '.join([f'*a{i - 1}'] * t[1])}]{'}' if t[2] else ''}\n"
                for i in range(1, t[0])
            )
        )
    ),
)


def any_bounded_yaml(text: str) -> str:
    """What is read is what PyYAML reads, it is JSON of bounded size, and dates are text."""
    found: list[Any] = []
    outcome = quick(lambda: found.append(parse_yaml(text, "a file")))
    for value in found:
        assert len(json.dumps(value, default=None)) < 1 << 24
        assert _depth(value) <= MAX_DEPTH + 1
        expected = yaml.load(text, _AsText)
        assert _same(value, expected)
    return outcome


class _AsText(yaml.CSafeLoader):
    """PyYAML's safe loader, with dates as text."""


_AsText.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node))


def _depth(value: Any) -> int:
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + max(map(_depth, inside), default=0)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


# ---- scripts

plain_texts = st.text("ab.=1 '\"\\\t", max_size=30)
shell_pieces = st.sampled_from(
    ["python -m verl.trainer.main_ppo ", "a.b=1 ", "actor_rollout_ref.rollout.n=8 ", "$X", "${X:-1}", "$(ls)", "`ls`", "\\\n",
     "\n", "'", '"', "# c\n", "A=(", ")", "B=x ", "<<EOF\n", "EOF\n", ";", "&&", "|", ">", "${", "$((", "}", "$@", "\\", " ",
     "\x1b", "é", "=", "+", "~"]
)  # fmt: skip
shell_texts = st.one_of(
    st.lists(shell_pieces, max_size=25).map("".join),
    st.tuples(shell_pieces, st.integers(1, 4000)).map(lambda t: t[0] * t[1]),
    st.tuples(shell_pieces, shell_pieces, st.integers(1, 2000)).map(lambda t: (t[0] + t[1]) * t[2]),
    st.text(max_size=60),
)


def any_words(text: str) -> str:
    """Words without an expansion are those of Python's shlex."""
    found: list[Any] = []
    outcome = quick(lambda: found.append(read_script(f"run {text}")))
    try:
        expected = shlex.split(f"run {text}")
    except ValueError:  # a quote that does not end
        return outcome
    [script] = found
    assert [word.text for command in script.commands for word in command] == expected
    assert all(word.literal for command in script.commands for word in command)
    return outcome


def any_script(text: str) -> str:
    found: list[Setup] = []
    outcome = quick(lambda: found.append(read_verl(written(text.encode("utf-8", "replace"), ".sh"))))
    for setup in found:
        assert json.dumps([dataclasses.asdict(f) for f in examine_setup(setup)])
        assert "main_ppo" in text or "actor_rollout_ref." in text
    return outcome


not_verl = st.one_of(shell_texts, yaml_texts).filter(
    lambda t: not any(w in t for w in ("main_ppo", "actor_rollout_ref", "ppo_trainer", "ppo_megatron_trainer"))
)


def false_verl(text: str) -> str:
    """No file is verl's without verl's keys, whatever its ending."""
    data = text.encode("utf-8", "replace")
    outcomes = {quick(lambda suffix=suffix: read_verl(written(data, suffix))) for suffix in (".sh", ".txt", ".yaml")}
    assert outcomes == {"refused"}
    return "refused"


_NUMBERS = {
    "actor_rollout_ref.rollout.n": "group", "actor_rollout_ref.rollout.temperature": "temperature",
    "actor_rollout_ref.rollout.top_p": "top_p",
}  # fmt: skip
verl_values = st.one_of(
    st.integers(1, 99).map(lambda x: (str(x), x)),
    st.integers(1, 99).map(lambda x: (f"'{x}'", x)),
    st.sampled_from([("${N:-3}", 3), ("$((1+1))", 2), ("${N:-$((2 * 2))}", 4)]),
    st.sampled_from(
        ["$N", "${N}", "${N:+3}$N", '"$1"', "$((N+1))", "`nproc`", "$(nproc)", "'${oc.env:N}'", "1$N", "'???'"]
    ).map(lambda x: (x, None)),
)
verl_settings = st.lists(
    st.tuples(st.sampled_from(list(_NUMBERS)), verl_values, st.sampled_from([" ", " \\\n  ", "  "])),
    min_size=1,
    max_size=8,
)


def any_settings(settings: list[tuple[str, tuple[str, int | None], str]]) -> str:
    """The last value of a key is the one, and a value that only a shell or the environment has is not known."""
    expected = {key: value for key, (_, value), _ in settings}
    text = (
        "python3 -m verl.trainer.main_ppo " + "".join(f"{key}={value}{gap}" for key, (value, _), gap in settings) + "\n"
    )
    setup = read_verl(written(text.encode(), ".sh"))
    for key, value in expected.items():
        assert getattr(setup, _NUMBERS[key]) == value
    unknown = {f.rule for f in examine_setup(setup) if f.seen.startswith("not known")}
    if expected.get("actor_rollout_ref.rollout.temperature", 1) is None:
        assert "sampling" in unknown or any(f.rule == "sampling" and f.level == "warning" for f in examine_setup(setup))
    return "fine"


# ---- other hosts

_DIALECTS = (openrlhf.DIALECT, skyrl.DIALECT, slime.DIALECT, nemo_rl.DIALECT, rllm.DIALECT)
_STARTS = {
    "OpenRLHF": "python3 -m openrlhf.cli.train_ppo_ray",
    "SkyRL": "uv run -m skyrl.train.entrypoints.main_base",
    "slime": "python3 train.py --num-rollout 1",
    "NeMo-RL": "python run_grpo.py grpo.num_prompts_per_step=8",
    "rLLM": "python train.py rllm/backend=verl",
}
host_values = st.one_of(
    st.integers(-3, 5000).map(str),
    st.floats(allow_nan=False).map(str),
    st.sampled_from(
        ["true", "False", "null", "", "''", "$N", "${A[@]}", "$(x)", "[1,2]", "{a: 1}", "0.2 0.3", "9" * 400]
    ),
    st.sampled_from(["k1", "k3", "grpo", "gspo", "cispo", "token", "rollout", "icepop", "ppo", "${x.y}", "???", "tis"]),
    st.text(alphabet="ab$'\"\\ =-{}", max_size=6),
)
host_commands = st.sampled_from(_DIALECTS).flatmap(
    lambda d: st.tuples(
        st.just(d.host),
        st.lists(st.tuples(st.sampled_from([*d.defaults, *d.flags, "x.y", "trainer.x"]), host_values), max_size=12).map(
            lambda pairs: " ".join(f"--{k} {v}" if d.options else f"{k}={v}" for k, v in pairs)
        ),
    )
)


def any_host(command: tuple[str, str]) -> str:
    """A command line of a host is read, or refused in words; what is read can be examined."""
    host, text = command
    found: list[Setup] = []
    outcome = quick(lambda: found.append(read_config(written(f"{_STARTS[host]} {text}\n".encode(), ".sh"))))
    for setup in found:
        assert setup.host == host
        assert json.dumps([dataclasses.asdict(f) for f in examine_setup(setup)])
    return outcome


toml_files = st.one_of(
    st.lists(
        st.tuples(st.sampled_from([*prime_rl.DEFAULTS, "orchestrator.train.source", "x"]), st.one_of(
            st.integers().map(str), st.floats().map(str),
            st.sampled_from(["'ipo'", "'custom'", "'grpo'", "'opd'", "true", "[]", "[{group_size = 2}]", "{}", "1e400", "0x9"]),
        )), max_size=10,
    ).map(lambda pairs: "[orchestrator]\n[trainer]\n" + "".join(f"{k} = {v}\n" for k, v in pairs)),
    st.lists(st.tuples(st.sampled_from(list(prime_rl.DEFAULTS)), st.sampled_from(["1", "0.5", "'ipo'", "true"])), max_size=8,
             unique_by=lambda pair: pair[0]).map(lambda pairs: "".join(f"{k} = {v}\n" for k, v in pairs)),
    st.text(max_size=60),
    st.sampled_from(["[", "a = [", "{", "a.", '"""', "[[a]]\n"]).flatmap(lambda x: st.integers(1, 20000).map(lambda n: x * n)),
)  # fmt: skip


def any_toml(text: str) -> str:
    found: list[Setup] = []
    outcome = quick(lambda: found.append(read_config(written(text.encode("utf-8", "replace"), ".toml"))))
    for setup in found:
        assert json.dumps([dataclasses.asdict(f) for f in examine_setup(setup)])
        assert "orchestrator" in text
    return outcome


# ---- TRL

trl_values = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=6), st.lists(st.integers(), max_size=2),
    st.sampled_from(["1e-6", "a:b", "x.y:z", "9" * 400, "${x}", "grpo", "bandpo-kl", "sequence", "mean"]),
    st.integers(1, 16),
)  # fmt: skip
trl_files = st.dictionaries(
    st.one_of(
        st.sampled_from(
            ["num_generations", "num_iterations", "per_device_train_batch_size", "temperature", "top_k", "epsilon",
             "epsilon_high", "loss_type", "scale_rewards",
             "objective", "radius", "divergence", "use_vllm", "pruning", "dtype", "learning_rate",
             "model_init_kwargs", "generation_kwargs", "task", "dataset", "reward", "steps_per_generation", "deepspeed", "beta"]
        ),
        st.text("abc_", max_size=6),
    ),
    trl_values, max_size=5,
)  # fmt: skip


def any_trl(given: dict[str, Any]) -> str:
    found: list[Setup] = []
    path = written(
        yaml.safe_dump({"num_generations": 4, "per_device_train_batch_size": 8, **given}).encode(), "-trl.yaml"
    )
    outcome = quick(lambda: found.append(read_config(path)))
    for setup in found:
        findings = examine_setup(setup)
        assert all(printable(line) for f in findings for line in (f.seen, *f.details))
        assert setup.objective is not None or any(f.seen.startswith("not known") for f in findings)
    return outcome


# ---- logs and batches

log_lines = st.lists(
    st.one_of(
        st.sampled_from(
            [b'{"reward": 1.0}', b'{"entropy": NaN}', b'{"loss": "NaN", "reward": 1e999}', b'{"reward": ' + b"9" * 500 + b"}",
             b"{}", b"", b"[" * 5000, b'{"reward": true}', b'{"frac_reward_zero_std": 1}', b'{"reward": 1.0', b"\xff",
             b'{"grad_norm": 0}']
        ),
        st.binary(max_size=20),
    ),
    max_size=12,
).map(lambda lines: b"\n".join(lines) + b"\n")  # fmt: skip


def any_log_file(data: bytes) -> str:
    """NaN and infinities are problems, whatever else there is."""
    found: list[Any] = []
    path = written(data, ".jsonl")
    outcome = quick(lambda: found.append((read_log(path), examine_log(read_log(path)))))
    for rows, findings in found:
        numbers = [v for row in rows for v in row.values() if isinstance(v, float)]
        if any(not math.isfinite(v) for v in numbers):
            assert any(f.rule == "nonfinite" and f.level == "problem" for f in findings)
    return outcome


def _other_logs() -> dict[str, bytes]:
    """A good file of each kind of log that is no JSON lines, of which the fuzzer changes bytes."""
    rows = [{"step": i, "entropy": 1.0 / (i + 1), "actor/grad_norm": 0.5 + i} for i in range(6)]
    table = "".join(f"{row['step']},{row['entropy']},{row['actor/grad_norm']}\n" for row in rows)
    console = "".join(
        f"step:{r['step']} - entropy:{r['entropy']} - actor/grad_norm:{r['actor/grad_norm']}\n" for r in rows
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.db"
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name TEXT, step INTEGER, metrics TEXT)")
        put = "INSERT INTO metrics (run_name, step, metrics) VALUES ('r', ?, ?)"
        database.executemany(put, [(row["step"], json.dumps(row)) for row in rows])
        database.commit()
        database.close()
        stored = path.read_bytes()
    events = Path(__file__).parents[1] / "doctor" / "data" / "events.out.tfevents.torch-2.13"
    return {
        ".csv": f"step,entropy,actor/grad_norm\n{table}".encode(),
        ".json": json.dumps({"log_history": rows}).encode(),
        ".log": console.encode(),
        ".db": stored,
        ".tfevents": events.read_bytes(),
    }


_GOOD_LOGS = _other_logs()
other_logs = st.tuples(
    st.sampled_from(list(_GOOD_LOGS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=4),
    st.one_of(st.just(1.0), st.floats(0, 1)),
)


def any_other_log(draw: tuple[str, list[tuple[float, bytes]], float]) -> str:
    """A log in which bytes were changed, or that was cut: it is read or refused, and cutting adds no rows."""
    suffix, changes, kept = draw
    data = bytearray(_GOOD_LOGS[suffix])
    for place, change in changes:
        at = int(place * len(data))
        data[at : at + len(change)] = change
    path = written(bytes(data[: math.ceil(kept * len(data))]), suffix)
    found: list[Any] = []
    outcome = quick(lambda: found.append([dataclasses.asdict(f) for f in examine_log(read_log(path))]))
    if found and not changes:  # cut only
        assert sum(1 for _ in read_log(path)) <= 6
    return outcome


def _saved() -> dict[str, bytes]:
    x = torch.linspace(-3, -1, 12).view(3, 4)
    good = {
        "logprobs": x,
        "old_logprobs": x - 0.1,
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "mask": torch.ones(3, 4),
    }
    pt, npz, compressed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(good, pt)
    np.savez(npz, **{k: v.numpy() for k, v in good.items()})
    np.savez_compressed(compressed, **{k: v.numpy() for k, v in good.items()})
    return {
        ".safetensors": save(good),
        ".pt": pt.getvalue(),
        ".npz": npz.getvalue(),
        "-compressed.npz": compressed.getvalue(),
    }


_GOOD = _saved()
batch_files = st.tuples(
    st.sampled_from(list(_GOOD)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=4),
    st.one_of(st.just(1.0), st.floats(0, 1)),
)


def any_batch_file(draw: tuple[str, list[tuple[float, bytes]], float]) -> str:
    """A batch in which bytes were changed, or that was cut."""
    suffix, changes, kept = draw
    data = bytearray(_GOOD[suffix])
    for place, change in changes:
        at = int(place * len(data))
        data[at : at + len(change)] = change
    path = written(bytes(data[: math.ceil(kept * len(data))]), suffix)
    return quick(lambda: [dataclasses.asdict(f) for f in examine_batch(load_batch(path))])


def beside_bash(script: str) -> str:
    """The words of a script are those that Bash gives the commands."""
    (empty := PLACE / "empty").mkdir(exist_ok=True)
    check(FIRST + script, empty)
    return "fine"


TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], str], bool, bool]] = {
    "YAML with aliases and merges": (yaml_texts, any_bounded_yaml, False, False),
    "words of scripts": (plain_texts, any_words, False, False),
    "scripts": (shell_texts, any_script, False, False),
    "scripts beside Bash": (scripts, beside_bash, False, False),
    "files that are not verl's": (not_verl, false_verl, True, False),
    "settings of verl scripts": (verl_settings, any_settings, False, False),
    "command lines of other hosts": (host_commands, any_host, False, False),
    "TOML": (toml_files, any_toml, False, False),
    "configurations of TRL": (trl_files, any_trl, False, True),
    "lines of logs": (log_lines, any_log_file, False, False),
    "bytes of other logs": (other_logs, any_other_log, False, False),
    "bytes of batches": (batch_files, any_batch_file, False, False),
}
