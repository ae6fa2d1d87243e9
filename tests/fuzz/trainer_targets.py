"""Fuzz targets of the trainers: metrics pooled from any parts, and checkpoints with anything in them."""

import copy
import functools
import io
import json
import math
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

from bandpo import OBJECTIVES, RatioBounds, TokenObjective, policy_metrics, token_objective
from bandpo._system.files import SEAL, damage, latest_whole, read_jsonl, seal
from bandpo.integrations.trl import BandGRPOTrainer
from bandpo.integrations.trl.checkpoint import _readable, latest_checkpoint
from bandpo.integrations.trl.pooled import Measured, PooledLog, without_empty
from bandpo.integrations.trl.signal import SignalWatch, without_signal
from bandpo.metrics import policy_sums
from bandpo.train.progress import Progress, TrainingProgress

PLACE = Path(tempfile.mkdtemp(prefix="bandpo-fuzz-trainer-"))


# ---- metrics of parts


class Processes:
    """accelerate's gather, where the other processes hold what is given."""

    device = torch.device("cpu")

    def __init__(self, others: list[torch.Tensor]) -> None:
        self.others = others

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, *self.others])


BATCHES_IN_PARTS = st.tuples(
    st.integers(0, 2**31),
    st.sampled_from(["bandpo-kl", "bandpo-tv", "dapo", "dcpo", "cispo"]),
    st.integers(0, 9),  # rows
    st.integers(1, 6),  # width
    st.lists(st.integers(0, 9), max_size=6),  # where it is cut
    st.integers(1, 4),  # ranks
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),  # how much is valid
    st.sampled_from([0.0, 0.0, 0.2]),  # how much is no number
)


def pooled_is_whole(draw: tuple[Any, ...]) -> str:
    """Metrics pooled over any ranks and micro-batches are those of the whole batch; empty parts are among them."""
    seed, objective, rows, width, cuts, ranks, share, strange = draw
    g = torch.Generator().manual_seed(seed)
    old = -6 * torch.rand(rows, width, generator=g) ** 2 - 0.01
    new = old + torch.minimum(0.5 * torch.randn(rows, width, generator=g), -old - 1e-3)
    advantages = torch.randn(rows, 1, generator=g).round()
    mask = torch.rand(rows, width, generator=g) < share
    new = new.masked_fill(torch.rand(rows, width, generator=g) < strange, math.nan)
    terms = token_objective(OBJECTIVES[objective], logprobs=new, old_logprobs=old, advantages=advantages, mask=mask)
    whole = policy_metrics(terms)

    def part(start: int, end: int) -> Any:
        def cut(x: Any) -> Any:
            return x[start:end] if isinstance(x, torch.Tensor) else x

        bounds = RatioBounds(*map(cut, terms.bounds))
        return policy_sums(TokenObjective(*map(cut, terms))._replace(bounds=bounds))

    edges = [0, *sorted(min(c, rows) for c in cuts), rows]
    parts = [part(edges[i], edges[i + 1]) for i in range(len(edges) - 1)]
    parts += [part(0, 0)] * (-len(parts) % ranks)
    pooled, log = PooledLog(), defaultdict(list)
    for first in range(0, len(parts), ranks):
        here, *others = parts[first : first + ranks]
        tables = [_table(o) for o in others]
        pooled.wait(Measured(here, lambda found: [pooled.put(*total) for total in found.items()]))
        pooled.settle(Processes(tables), log)
        pooled.load(json.loads(json.dumps(pooled.parts)), of=log)  # as a checkpoint in between
    without_empty(log)
    for name, value in whole.items():
        if math.isnan(value):
            assert name not in log, name
        else:
            (found,) = log[name]
            assert abs(found - value.item()) <= 1e-5 * abs(value.item()) + 60 * 2**-24 or found == value.item(), name
    return "fine"


def _table(sums: Any) -> torch.Tensor:
    """The row of another process: its numbers by dtype, in the order in which the dtypes are met."""
    numbers = [x for s in sums.values() for x in s[:2]]
    kinds = dict.fromkeys(x.dtype for x in numbers)
    return torch.stack([x.double() for kind in kinds for x in numbers if x.dtype == kind]).unsqueeze(0)


REWARDS = st.tuples(
    st.integers(1, 4), st.integers(1, 3), st.booleans(), st.lists(st.sampled_from([0.0, 1.0, 0.1, 12345.678, math.nan]),
    min_size=12, max_size=12),
)  # fmt: skip


def signal_is_a_difference(draw: tuple[int, int, bool, list[float]]) -> str:
    """A group has signal exactly where two scored rewards (of one function, or summed) differ: by plain Python."""
    size, functions, summed, values = draw
    rows = len(values) // functions // size * size
    table = torch.tensor(values[: rows * functions]).view(rows, functions)
    found = without_signal(table, torch.ones(functions), size, summed_first=summed).tolist()
    for group, silent in zip(table.view(-1, size, functions), found, strict=True):
        if summed:
            columns = [[row[~row.isnan()].sum().item() for row in group if not row.isnan().all()]]
        else:
            columns = [[x for x in column if not math.isnan(x)] for column in group.T.tolist()]
        assert silent == all(len(set(c)) <= 1 for c in columns)
    return "fine"


# ---- checkpoints

plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(st.text(max_size=9), x, max_size=3)),
    max_leaves=8,
)
SEALS = st.one_of(
    st.binary(max_size=60),
    plain.map(lambda x: json.dumps(x).encode()),
    st.dictionaries(
        st.sampled_from(["data", "../data", "/etc/passwd", "", "a" * 300, "x\x00y", "."]), plain, max_size=3
    ).map(lambda x: json.dumps(x).encode()),
    st.sampled_from([b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 50_000, b'{"data": [5, 1e999]}', b"9" * 5000]),
)


@functools.cache
def _sealed(process: int) -> tuple[Path, Any]:
    """A sealed folder of this process, and what its seal says."""
    folder = PLACE / f"checkpoint-{process}0"
    folder.mkdir()
    (folder / "data").write_bytes(b"hello")
    seal(folder)
    return folder, json.loads((folder / SEAL).read_text())


def any_seal(content: bytes) -> str:
    """A folder whose seal is anything: damaged, or what it says of its files is true."""
    folder, whole = _sealed(os.getpid())
    (folder / SEAL).write_bytes(content)
    said: list[str] = []
    wrong = damage(folder)
    assert (latest_whole([folder], lambda _: 1, said.append) is None) == (wrong is not None) == bool(said)
    latest_checkpoint(PLACE, said.append)
    if wrong is None:
        assert json.loads(content) == whole
        return "fine"
    assert wrong and "\n" not in wrong.splitlines()[0]
    return "refused"


SETTINGS = {"processes": 1, "per_device_train_batch_size": 8}
WHOLE_STATE: dict[str, Any] = {
    "settings": SETTINGS, "loss": torch.tensor(0.5), "logged": 3, "step": 4, "metrics": {"kl": [0.1]}, "rollout": None,
    "pooled": {"kl": [0.3, 8.0, "mean"]}, "signal": SignalWatch().state_dict(), "pruning": {}, "drawn": 0,
    "measured": [0.0, 0.0], "radius": {},
}  # fmt: skip


class Reader(BandGRPOTrainer):
    """What of a trainer reads a checkpoint, without a model."""

    def __init__(self) -> None:
        self.accelerator = SimpleNamespace(process_index=0, num_processes=1)
        self._metrics = {"train": defaultdict(list)}
        self._pooled = {"train": PooledLog()}
        self._signal, self._pruned, self._refill, self._radius = SignalWatch(), None, None, None

    def _settings(self) -> dict[str, Any]:
        return SETTINGS

    def read(self, folder: Path) -> None:
        state = self._state_in(folder)
        with _readable(folder):
            self.take_state(state)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _changed(draw: tuple[str, Any]) -> bytes:
    state = copy.deepcopy(WHOLE_STATE)
    state[draw[0]] = draw[1]
    return _saved(state)


def _cut(draw: tuple[int, int]) -> bytes:
    data = bytearray(_saved(WHOLE_STATE))
    place = draw[0] % len(data)
    if draw[1] > 255:
        return bytes(data[:place])
    data[place] = draw[1]
    return bytes(data)


STATES = st.one_of(
    st.binary(max_size=80),
    plain.map(_saved),
    st.tuples(st.sampled_from(list(WHOLE_STATE)), plain).map(_changed),
    st.tuples(st.integers(0, 10_000), st.integers(0, 400)).map(_cut),
)


def any_state(content: bytes) -> str:
    """A checkpoint whose state is anything: one sentence, or a trainer that can go on and write its log."""
    folder = PLACE / f"checkpoint-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / "bandpo_state_0.pt").write_bytes(content)
    reader = Reader()
    try:
        reader.read(folder)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "cannot be resumed" in message
        return "refused"
    pooled, log = reader._pooled["train"], reader._metrics["train"]
    pooled.settle(reader.accelerator, log)
    without_empty(log)
    reader._signal.note(torch.tensor([True]), torch.tensor([0.0]))
    assert reader._signal.verdict() is None or reader._signal.verdict()
    return "fine"


ROWS = st.lists(
    st.one_of(
        plain.map(lambda x: json.dumps(x)), st.builds(lambda step, x: json.dumps({"step": step, "loss": x}), plain, plain),
        st.builds(lambda step: json.dumps({"step": step, "train_runtime": 1.0}), st.integers(-3, 9)), st.text(max_size=9),
        st.sampled_from(["[" * 3000, '{"a":' * 2000, '{"step": 1e400}', '{"step": NaN}', '{"step": ' + "9" * 5000 + "}"]),
    ),
    max_size=5,
)  # fmt: skip


def any_metrics_file(lines: list[str]) -> str:
    """A run goes on whose metrics.jsonl has anything in it: one sentence, or the rows up to the checkpoint are kept."""
    folder = PLACE / f"run-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_bytes("".join(line + "\n" for line in lines).encode(errors="replace"))
    callback = TrainingProgress(Progress(main=False), folder)
    state = SimpleNamespace(is_world_process_zero=True, global_step=5, max_steps=9)
    try:
        callback.on_train_begin(None, state, None)  # type: ignore[arg-type]
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "metrics.jsonl" in message
        return "refused"
    assert all(row["step"] <= 5 and "train_runtime" not in row for row in read_jsonl(path))
    return "fine"


TARGETS: dict[str, tuple[st.SearchStrategy[Any], Any, bool, bool]] = {
    "metrics of any parts": (BATCHES_IN_PARTS, pooled_is_whole, False, False),
    "signal of any groups": (REWARDS, signal_is_a_difference, False, False),
    "any seal of a checkpoint": (SEALS, any_seal, False, False),
    "any state of a checkpoint": (STATES, any_state, False, False),
    "any metrics.jsonl of a resumed run": (ROWS, any_metrics_file, False, False),
}
