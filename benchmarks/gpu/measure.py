"""What all parts share: the device, paired timings by the device's own clock, and rows that are written as they come."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bandpo import terms

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # formulas.py, record.py and seconds.py

from seconds import Seconds  # noqa: E402 - found by the path above

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
Call = Callable[[], object]


class Part(NamedTuple):
    """What a part is given: its size, its time, and where its rows go."""

    name: str
    tiny: bool
    ends: float
    """Of `time.monotonic()`."""
    out: Path
    """The file of JSON lines."""
    model: str = ""
    """Folder of the language model."""

    def left(self) -> float:
        """Seconds that the part still has."""
        return self.ends - time.monotonic()

    def row(
        self,
        what: str,
        value: float | None,
        unit: str = "",
        aim: str = "",
        note: str = "",
        *,
        exact: bool = False,
        **more: object,
    ) -> None:
        """One line of the table, written and flushed at once. At a tiny size only what is exact is judged by its aim."""
        from record import is_met

        judged = value is not None and (exact or not self.tiny)
        met = {True: "yes", False: "no", None: ""}[is_met(value, aim)] if judged and value is not None else ""
        found = None if value is None else float(f"{value:.5g}")
        if isinstance(more.get("quartiles"), list):
            more["quartiles"] = [float(f"{x:.4g}") for x in more["quartiles"]]
        self.write({"what": what, "value": found, "unit": unit, "aim": aim, "met": met, "note": note, **more})

    def write(self, line: Mapping[str, object]) -> None:
        """One JSON line of this part; a NaN becomes null."""
        text = json.dumps(_plain({"part": self.name, **line}), ensure_ascii=False, allow_nan=False)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(text, flush=True)


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not abs(x) < float("inf") else x


def wait() -> None:
    """Until the device has done what it was given."""
    if ON_GPU:
        torch.cuda.synchronize()


@contextmanager
def kernel_used(used: bool) -> Iterator[None]:
    """`policy_loss` with or without the Triton kernel, also on a CPU, where the interpreter runs it."""
    before = terms._runs_triton
    terms._runs_triton = lambda _device: used  # type: ignore[assignment]
    try:
        yield
    finally:
        terms._runs_triton = before


def captured(call: Call) -> tuple[Call, bool]:
    """The launches of a call as one CUDA graph, so that the host's own time is not measured, and whether that worked."""
    if not ON_GPU:
        return call, False
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"not captured: {error}", flush=True)
        wait()
        return call, False
    return graph.replay, True


def paired(cases: Mapping[str, Call], *, rounds: int = 15, seconds: float = 10.0) -> Seconds:
    """Time the cases in turn, round by round; fewer rounds where the seconds are spent, and at least one."""
    repeats = {name: _repeats(call) for name, call in cases.items()}
    found: dict[str, list[float]] = {name: [] for name in cases}
    end = time.monotonic() + seconds
    for done in range(rounds):
        if done and time.monotonic() > end:
            break
        for name, call in cases.items():
            found[name].append(_seconds(call, repeats[name]))
    return Seconds(found)


def _repeats(call: Call) -> int:
    """So many calls that the clock's own error is small; the first two compile and fill caches."""
    call()
    call()
    return max(1, min(20, int(2e-3 / max(_seconds(call, 1), 1e-6)))) if ON_GPU else 1


def _seconds(call: Call, repeats: int) -> float:
    """Of one call, by CUDA events around all of them."""
    if not ON_GPU:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def peak_bytes(call: Call) -> int | None:
    """The most that a call has in use beyond what was there before; None on a CPU."""
    if not ON_GPU:
        call()
        return None
    call()
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    wait()
    return torch.cuda.max_memory_allocated() - before


def free() -> None:
    """Give the memory of the last size back."""
    if ON_GPU:
        torch.cuda.empty_cache()


class Tokens:
    """Log-probs of two policies, advantages and masks of `(rows, 1024)` tokens; a fifth of them nearly certain."""

    def __init__(self, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        g = torch.Generator(device=DEVICE).manual_seed(seed)
        width = min(1024, tokens)
        shape = (tokens // width, width)
        old = torch.rand(shape, generator=g, device=DEVICE)
        certain = torch.rand(shape, generator=g, device=DEVICE) < 0.2
        old.mul_(torch.where(certain, -1e-3, -6.0))
        del certain
        self.new = torch.randn(shape, generator=g, device=DEVICE).mul_(0.2).add_(old).clamp_(max=-1e-6).to(dtype)
        self.old = old.to(dtype)
        self.advantages = torch.randn(shape[0], 1, generator=g, device=DEVICE)
        self.valid = torch.rand(shape, generator=g, device=DEVICE) < 0.9

    @property
    def mask(self) -> torch.Tensor:
        """The mask as hosts hand it over, int64."""
        if not hasattr(self, "_mask"):
            self._mask = self.valid.long()
        return self._mask
