"""A batch that is examined part by part: the same findings as in one part, radii with their bound, bounded memory."""

import itertools
import math
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bandpo import CHI2, KL, TV, Band, Clip
from bandpo._inputs import traits
from bandpo.bounds import DCPO, BySign, radius_for
from bandpo.bounds.calibration import Largest, Tally
from bandpo.bounds.edges import outside
from bandpo.divergences import binary_divergence
from bandpo.doctor import batch as doctor_batch
from bandpo.doctor import batch_files, examine_batch
from bandpo.doctor.batch import load_batch
from bandpo.objective import Objective

REGIONS = [
    Clip(0.2),
    DCPO(),
    Band(KL, 0.05),
    Band(TV, 0.05, max_ratio=None),
    Band(CHI2, 0.1),
    BySign(Clip(0.1), Clip(0.3)),
]


def tokens(n, seed=0, ties=False):
    """Tokens with holes in the mask, numbers that are no log-probs, and ties where asked for."""
    g = torch.Generator().manual_seed(seed)
    x = 0.4 * torch.randn(n, generator=g, dtype=torch.float64)
    logp = -6 * torch.rand(n, generator=g, dtype=torch.float64).pow(2) - 1e-4
    if ties:
        x, logp = (x * 4).round() / 4, (logp * 2).round() / 2 - 0.5
    a = torch.randn(n, generator=g, dtype=torch.float64) * (torch.rand(n, generator=g) < 0.9)
    x = x.masked_fill(torch.rand(n, generator=g) < 0.02, math.nan)
    logp = logp.masked_fill(torch.rand(n, generator=g) < 0.02, -math.inf)
    return {"log_ratio": x, "old_logprobs": logp, "advantages": a, "mask": torch.rand(n, generator=g) < 0.8}


def answer(tally, i, target):
    try:
        return tally.radius_for(i, target)
    except ValueError as error:
        return str(error)


def parts_of(batch, cuts):
    places = sorted({0, len(batch["mask"]), *cuts})
    return [{k: v[a:b] for k, v in batch.items()} for a, b in itertools.pairwise(places)]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 300), seed=st.integers(0, 99), ties=st.booleans(), cuts=st.sets(st.integers(0, 300), max_size=6),
       target=st.floats(0.01, 0.5))  # fmt: skip
def test_any_parts_give_what_the_whole_gives(n, seed, ties, cuts, target):
    batch = tokens(n, seed, ties)
    whole, parted = Tally(REGIONS, ["kl", "tv", "chi2"]), Tally(REGIONS, ["kl", "tv", "chi2"])
    whole.add(batch)
    for part in parts_of(batch, {c for c in cuts if c < n}):
        parted.add(part)
    assert (whole.valid, whole.pushed, whole.outside) == (parted.valid, parted.pushed, parted.outside)
    for i in range(3):
        expected, found = answer(whole, i, target), answer(parted, i, target)
        if isinstance(expected, str):
            assert found == expected
            continue
        assert found.radius == pytest.approx(expected.radius, rel=1e-12) and found.error == 0
        assert found.outside == expected.outside or ties  # of a tie, rounding may decide


@pytest.mark.parametrize("ties", [False, True])
def test_counts_and_radii_are_those_of_the_definition(ties):
    """Against the whole batch at once in float64, without the float32 tables, and a sort."""
    batch = tokens(200_000, ties=ties)
    tally = Tally(REGIONS, ["kl", "tv", "chi2"])
    for part in parts_of(batch, {70_000, 70_001, 150_000}):
        tally.add(part)
    x, logp, a, mask = (batch[k] for k in ("log_ratio", "old_logprobs", "advantages", "mask"))
    valid = mask & x.isfinite() & logp.isfinite()
    pushed = valid & (a * x > 0)
    assert (tally.valid, tally.pushed) == (int(valid.sum()), int(pushed.sum()))
    for region, count in zip(REGIONS, tally.outside, strict=True):
        bounds = region(logp, advantages=a) if isinstance(region, BySign) else region(logp)
        assert count == int((pushed & outside(x, a, bounds)).sum())
    for i, divergence in enumerate((KL, TV, CHI2)):
        sizes = binary_divergence(torch.minimum(x, -logp), logp, divergence)[pushed].sort(descending=True).values
        k = round(0.05 * tally.valid)
        split = tally.radius_for(i, 0.05)
        assert split.radius == pytest.approx(((sizes[k - 1] + sizes[k]) / 2).item(), rel=1e-14)
        assert split.outside == k or ties
        assert radius_for(divergence, 0.05, batch) == pytest.approx(split.radius, rel=1e-14)


def test_tokens_at_their_bound_are_solved_in_float64(monkeypatch):
    """Ratios within rounding of their bound: the table alone would put some on the other side."""
    n = 1 << 16
    logp = -5 * torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1e-3
    band = Band(KL, 0.05, max_ratio=None)
    x = band(logp).upper.log() + 1e-9 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a = torch.ones_like(x)
    expected = int((x.exp() > band(logp).upper).sum())
    tally = Tally([band])
    tally.add({"log_ratio": x, "old_logprobs": logp, "advantages": a})
    assert tally.outside == [expected] and 0.3 * n < expected < 0.7 * n
    table = band(logp.float())
    assert int((x.exp() > table.upper.double()).sum()) != expected


@pytest.mark.parametrize("rank", [1, 5, 500, 2_000])
def test_few_large_numbers_are_exact_in_a_long_stream(rank, monkeypatch):
    monkeypatch.setattr(Largest, "KEPT", 5_000)
    values = torch.rand(60_000, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).pow(4)
    values[:100] = values[200]  # ties
    largest = Largest(2_000)
    for part in values.split(997):
        largest.add(part)
    ordered = values.sort(descending=True).values
    split = largest.split(rank)
    assert split == (((ordered[rank - 1] + ordered[rank]) / 2).item(), rank, 0.0)
    assert sum(len(part) for part in largest._parts) <= 5_000


@settings(max_examples=12, deadline=None)
@given(rank=st.integers(1, 19_999), seed=st.integers(0, 99), constant=st.booleans())
def test_the_sketch_is_within_its_bound_and_its_count_exact(rank, seed, constant):
    values = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul(3).exp()
    if constant:
        values[1_000:19_000] = 0.5
    largest = Largest(19_999)
    largest.KEPT = 5_000
    for part in values.split(3_001):
        largest.add(part)
    split = largest.split(rank)
    exact = values.sort(descending=True).values[rank - 1 : rank + 1].mean().item()  # also where these are far apart
    assert split.error == 2**-10
    assert abs(split.radius - exact) <= split.error * exact
    assert split.outside == int((values > split.radius).sum())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_sketch_takes_the_middle_of_a_gap_as_the_exact_radius_does(rank):
    values = torch.cat([torch.tensor([-0.0, 64.0, 8.0, 1.0]).double(), torch.full((5_000,), 1e-3).double()])
    largest = Largest(4_000)
    largest.KEPT = 5_000
    largest.add(values)
    exact = values.sort(descending=True).values[rank - 1 : rank + 1].mean().item()
    split = largest.split(rank)
    assert split.error == 2**-10
    assert split.outside == rank == int((values > split.radius).sum())
    assert abs(split.radius - exact) <= split.error * exact


def saved(n=6_000, width=30, seed=3, **changes):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(n // width, width, generator=g) - 0.01
    new = (old + 0.3 * torch.randn(old.shape, generator=g)).clamp(max=-1e-6)
    new[0, :3] = math.nan
    new[1, 4] = 0.5
    b = {"logprobs": new, "old_logprobs": old, "advantages": torch.randn(n // width, generator=g),
         "mask": torch.rand(old.shape, generator=g) < 0.9, "rollout_logprobs": old + 0.05}  # fmt: skip
    return {**b, **changes}


@pytest.mark.parametrize("part", [1, 31, 1000, 1499])
@pytest.mark.parametrize("flat", [False, True])
def test_findings_do_not_depend_on_the_parts(part, flat, monkeypatch, tmp_path):
    b = saved(60 if part == 1 else 1500)
    if flat:
        b["advantages"] = b["advantages"].unsqueeze(1).expand(b["mask"].shape)
        b = {k: v.reshape(-1) for k, v in b.items()}
    save_file({k: v.contiguous() for k, v in b.items()}, tmp_path / "b.safetensors")
    whole = examine_batch(b, target=0.05)
    monkeypatch.setattr(doctor_batch, "_PART", part)
    assert examine_batch(b, target=0.05) == whole
    assert examine_batch(load_batch(tmp_path / "b.safetensors"), target=0.05) == whole
    turned = {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in b.items()}  # strided
    assert examine_batch(turned, target=0.05) == whole
    expected = ["nonfinite", "positive", "ratios", "clipping", "radius", "mismatch", "effective size", "gradient"]
    assert [f.rule for f in whole] == expected + ["length bias"] * (
        not flat and part > 1
    )  # of 2 sequences there is no quarter


def test_a_region_that_depends_on_the_whole_batch_is_not_counted_in_parts(monkeypatch):
    @traits("of_batch")
    def bounds(logp):
        return Clip(0.2)(logp - logp.mean())

    own = Objective(name="own", bounds=bounds)
    [row] = [r for f in examine_batch(saved(), objectives=[own]) for r in f.details if r.startswith("own")]
    assert float(row.split()[-1]) > 0
    monkeypatch.setattr(doctor_batch, "_PART", 100)
    [row] = [r for f in examine_batch(saved(), objectives=[own]) for r in f.details if r.startswith("own")]
    assert row.endswith("not counted: its region depends on the whole batch")


@pytest.mark.parametrize("lists", [False, True])
def test_parquet_files_have_tokens_or_lists_of_them(lists, tmp_path, monkeypatch):
    b = saved()
    lengths = torch.randint(0, 31, (200,), generator=torch.Generator().manual_seed(0))
    kept = torch.arange(30) < lengths.unsqueeze(1)  # ragged: each sequence has its own length
    flat = {k: (v if v.ndim == 2 else v.unsqueeze(1).expand(kept.shape))[kept] for k, v in b.items()}
    columns = {k: v.numpy() for k, v in flat.items()}
    if lists:
        columns = {k: [row[n].numpy() for row, n in zip(v, kept, strict=True)] for k, v in b.items() if v.ndim == 2}
        columns["advantages"] = b["advantages"].numpy()
    monkeypatch.setattr(batch_files, "_ROWS", 64)
    pyarrow.parquet.write_table(
        pyarrow.table({**columns, "prompt": ["x"] * len(columns["advantages"])}), tmp_path / "b.parquet"
    )
    assert examine_batch(load_batch(tmp_path / "b.parquet")) == examine_batch(flat)


def test_bad_parquet_files_and_headers_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "b.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="cannot be read as a batch"):
        load_batch(path)
    for columns, message in (
        ({"logprobs": [[-1.0], [-1.0, -2.0]], "old_logprobs": [[-1.0, -1.0], [-1.0]], "advantages": [1.0, 1.0]}, "of other"),
        ({"logprobs": [-1.0, None], "old_logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]}, "empty cells"),
        ({"logprobs": ["a"], "old_logprobs": ["b"], "advantages": [1.0]}, "cannot be read as a batch"),
    ):  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(ValueError, match=message):
            load_batch(path)
    n = 3 << 20  # the same number again and again takes no room in a file
    pyarrow.parquet.write_table(
        pyarrow.table({k: np.zeros(n) for k in ("logprobs", "old_logprobs", "advantages")}), path
    )
    with pytest.raises(ValueError, match=r"it has more than 1,048,576 values|more than [\d,]+ values"):
        load_batch(path)
    for entry, message in (
        ('"F32","shape":[3],"data_offsets":[0,8]', "does not fit"), ('"F32","shape":[2],"data_offsets":[4,12]', "does not fit"),
        ('"F32","shape":[-2,-1],"data_offsets":[0,8]', "no shape"), ('"X","shape":[2],"data_offsets":[0,8]', "dtype X"),
        ('"F32"', "data_offsets"),
    ):  # fmt: skip
        header = f'{{"logprobs":{{"dtype":{entry}}}}}'.encode()
        (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(ValueError, match=message):
            load_batch(tmp_path / "b.safetensors")
    monkeypatch.setitem(batch_files.FORMATS, ".npz", (batch_files.FORMATS[".npz"][0], 10))
    np.savez(tmp_path / "b.npz", logprobs=np.zeros(3))
    with pytest.raises(ValueError, match="is too large: it has more than 10 bytes"):
        load_batch(tmp_path / "b.npz")


def test_a_large_pt_file_is_mapped_and_a_file_that_shrinks_is_an_error(tmp_path, monkeypatch):
    b = saved()
    torch.save(b, tmp_path / "b.pt")
    monkeypatch.setattr(batch_files, "_MAPPED", 1)
    mapped = load_batch(tmp_path / "b.pt")
    assert examine_batch(mapped) == examine_batch(b)
    save_file(b, tmp_path / "b.safetensors")
    stored = load_batch(tmp_path / "b.safetensors")
    with (tmp_path / "b.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="became shorter while it was read"):
        examine_batch(stored)


def test_memory_does_not_grow_with_the_batch(tmp_path, monkeypatch):
    """Of what Python allocates (the buffers of the file) and of what is kept for the radii."""
    monkeypatch.setattr(doctor_batch, "_PART", 1 << 14)
    peaks = []
    for n in (60_000, 600_000):
        save_file(saved(n), tmp_path / "b.safetensors")
        tracemalloc.start()
        examine_batch(load_batch(tmp_path / "b.safetensors"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 100_000
