"""Packing: every sequence once, dense, and the same log-probs and gradients as the padded batch."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from bandpo.selection import density, pack_rows, packed_logprobs, packing, window_pack


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 20))
def test_every_sequence_once_and_none_too_late(lengths, window):
    bins = window_pack(lengths, 30, window)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 30 for b in bins)
    done = set()
    for b in bins:
        oldest = min(set(range(len(lengths))) - done)
        assert b[0] == oldest  # the oldest opens the bin
        reach = oldest
        for count, i in enumerate(b):
            reach = max(reach, i)
            # Nothing is taken from beyond the window: at most window - 1 unpacked ones before it are passed over.
            assert len([j for j in range(i) if j not in done and j not in b[:count]]) < window
        done |= set(b)
    assert window_pack(lengths, 30, 1) == sequential(lengths, 30)


def sequential(lengths, capacity):
    bins, room = [], 0
    for i, length in enumerate(lengths):
        if length > room:
            bins.append([])
            room = capacity
        bins[-1].append(i)
        room -= length
    return bins


@given(st.integers(1, 200), st.integers(1, 70), st.data())
def test_the_bins_are_those_of_a_search_through_the_whole_window(capacity, window, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=150))
    assert window_pack(lengths, capacity, window) == searched(lengths, capacity, window)


def test_many_sizes_need_a_tree_of_several_levels():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9000, (6000,), generator=g).tolist()
    for window in (8, 5000):
        assert window_pack(lengths, 9000, window) == searched(lengths, 9000, window)


def searched(lengths, capacity, window):
    """The rule, word for word: quadratic in the window."""
    pending, bins = list(range(len(lengths)))[:window], []
    coming = list(range(len(lengths)))[window:]
    while pending:
        room, pick = capacity, pending[0]
        bins.append([])
        while pick is not None:
            bins[-1].append(pick)
            pending.remove(pick)
            pending += [coming.pop(0)] if coming else []
            room -= lengths[pick]
            fitting = [i for i in pending if lengths[i] <= room]
            pick = max(fitting, key=lambda i: (lengths[i], -i)) if fitting else None
    return bins


def test_the_packer_grows_no_faster_than_n_log_n(monkeypatch):
    """Visits of words of the tree, which are all that is not constant for a sequence, with the whole input as the window."""
    visits = []

    class Counted(list):
        def __getitem__(self, at):
            visits.append(at)
            return super().__getitem__(at)

    class Watched(packing._Members):
        def __init__(self, size):
            super().__init__(size)
            self._levels = [Counted(words) for words in self._levels]

    monkeypatch.setattr(packing, "_Members", Watched)
    found = {}
    for n in (500, 4000):
        visits.clear()
        window_pack([1 + (i * 7919) % 100_003 for i in range(n)], 100_003, n)
        found[n] = len(visits)
    assert found[4000] < 8 * 2 * found[500]  # 64 times as many for a search through the window


def test_density_on_long_tailed_lengths():
    g = torch.Generator().manual_seed(0)
    lengths = torch.exp(5.6 + 0.8 * torch.randn(2000, generator=g)).long().clamp(1, 1024).tolist()
    found = {w: density(lengths, window_pack(lengths, 2048, w), 2048) for w in (1, 8, 32, 128)}
    batches = [lengths[i : i + 8] for i in range(0, 2000, 8)]
    padded = sum(lengths) / sum(len(b) * max(b) for b in batches)
    assert found[8] >= 0.97
    assert 0.85 < found[1] < 0.93  # in order
    assert 0.4 < padded < 0.6  # eight in a batch, padded to the longest
    assert found[8] <= found[32] <= found[128]


@pytest.mark.parametrize(("lengths", "capacity", "window"), [([5], 4, 8), ([0, 3], 4, 8), ([1], 0, 8), ([1], 4, 0)])
def test_what_does_not_fit_is_named(lengths, capacity, window):
    with pytest.raises(ValueError, match="window_pack"):
        window_pack(lengths, capacity, window)


def model(attention, dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, attn_implementation=attention)  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def batch(seed=0, rows=9, width=14):
    """Padding on both sides, as in a rollout: prompts on the left, completions on the right."""
    g = torch.Generator().manual_seed(seed)
    left = torch.randint(0, 5, (rows, 1), generator=g)
    right = torch.randint(0, 7, (rows, 1), generator=g)
    at = torch.arange(width)
    mask = ((at >= left) & (at < width - right)).long()
    return torch.randint(1, 40, (rows, width), generator=g) * mask, mask


def logprobs_one_by_one(net, ids, mask):
    """Each sequence alone, without any padding."""
    rows = []
    for row, real in zip(ids, mask != 0, strict=True):
        logits = net(input_ids=row[real].unsqueeze(0)).logits[0, :-1]
        found = logits.log_softmax(-1).gather(-1, row[real][1:, None]).squeeze(-1)
        found = torch.nn.functional.pad(found, (1, 0))
        rows.append(torch.zeros(len(row), dtype=found.dtype).masked_scatter(real, found))
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [1, 8])
def test_packed_and_padded_agree_in_value_and_gradient(attention, window):
    net = model(attention)
    ids, mask = batch()
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for packed in (True, False):
        net.zero_grad()
        if packed:
            call = lambda **kw: net(**kw, use_cache=False).logits  # noqa: E731
            found = packed_logprobs(call, ids, mask, capacity=30, window=window)
        else:
            found = logprobs_one_by_one(net, ids, mask)
        (found * weights).sum().backward()
        gradients.append((found.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])))
    (values, gradient), (expected, expected_gradient) = gradients
    # transformers' eager attention takes its softmax in float32
    rounding = 1e-6 if attention == "eager" else 1e-10
    torch.testing.assert_close(values, expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(gradient, expected_gradient, rtol=10 * rounding, atol=10 * rounding)


def test_a_sequence_does_not_see_its_neighbours():
    net = model("sdpa")
    ids, mask = batch()
    call = lambda **kw: net(**kw, use_cache=False).logits  # noqa: E731
    one = packed_logprobs(call, ids, mask, capacity=40)
    other = ids.clone()
    other[3] = (other[3] + 1) * mask[3] % 40
    two = packed_logprobs(call, other, mask, capacity=40)
    rest = [i for i in range(len(ids)) if i != 3]
    assert torch.equal(one[rest], two[rest]) and not torch.equal(one[3], two[3])


def test_packing_and_unpacking_is_the_identity():
    ids, mask = batch(2)
    packed = pack_rows(ids, mask, capacity=33)
    torch.testing.assert_close(packed.unpack(packed.pack(ids, -1)), ids)
    assert (packed.sequence_ids >= 0).sum() == mask.sum()


def test_varlen_arguments_describe_the_flat_row():
    """Flash attention's calling convention, with each segment of `cu_seq_lens` run by itself in its place."""
    net = model("sdpa")
    ids, mask = batch(3)
    packed = pack_rows(ids, mask, capacity=33)
    flat, positions, calls = packed.flat(packed.input_ids), packed.flat(packed.position_ids), packed.varlen()
    ends = calls["cu_seq_lens_q"].tolist()
    assert calls["cu_seq_lens_q"].dtype == torch.int32 and ends[-1] == flat.shape[1] == int(mask.sum())
    assert calls["max_length_q"] == int(mask.sum(1).max())
    parts = []
    for a, b in itertools.pairwise(ends):
        assert positions[0, a:b].tolist() == list(range(b - a))
        parts.append(net(input_ids=flat[:, a:b]).logits[0])
    logits = torch.cat(parts)
    found = torch.zeros(packed.input_ids.shape, dtype=torch.float64)
    shifted = logits[:-1].log_softmax(-1).gather(-1, flat[0, 1:, None]).squeeze(-1)
    found[packed.sequence_ids >= 0] = torch.nn.functional.pad(shifted, (1, 0))
    found = packed.unpack(found.masked_fill(packed.position_ids == 0, 0.0))
    torch.testing.assert_close(found, logprobs_one_by_one(net, ids, mask), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "mask", [torch.tensor([[1, 1, -100]]), torch.tensor([[1, 2, 0]]), torch.tensor([[1.0, 0.5, 0.0]])]
)
def test_a_mask_that_is_not_of_zeros_and_ones_is_refused(mask):
    with pytest.raises(ValueError, match="must be bool, or 0 and 1"):
        pack_rows(torch.ones(1, 3, dtype=torch.long), mask, capacity=3)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"must be \(batch, time\) both"):
        pack_rows(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4), capacity=9)


def test_a_model_that_mixes_sequences_is_refused():
    ids, mask = batch()
    g = torch.Generator().manual_seed(0)
    table = torch.randn(40, 40, generator=g)
    with pytest.raises(ValueError, match="this model gives packed sequences other logits"):
        packed_logprobs(lambda input_ids, position_ids: table[input_ids].cumsum(1), ids, mask, capacity=40)
    # Weights that depend on the position in the row, not in the sequence.
    with pytest.raises(ValueError, match="ignore positions"):
        packed_logprobs(
            lambda input_ids, position_ids: table[input_ids] * torch.arange(input_ids.shape[1]).view(1, -1, 1), ids, mask,
            capacity=40,
        )  # fmt: skip
    found = packed_logprobs(
        lambda input_ids, position_ids: table[input_ids] * position_ids.unsqueeze(-1), ids, mask, capacity=40
    )
    assert found.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(30, 90), st.integers(1, 8), st.booleans())
def test_packing_of_any_lengths_is_each_sequence_alone(lengths, capacity, window, left):
    net = windowed()
    width = max(lengths)
    at = torch.arange(width)
    size = torch.tensor(lengths).unsqueeze(1)
    mask = ((at >= width - size) if left else (at < size)).long()
    ids = torch.randint(1, 40, mask.shape, generator=torch.Generator().manual_seed(sum(lengths))) * mask
    call = lambda **kw: net(**kw, use_cache=False).logits  # noqa: E731
    with torch.no_grad():
        found = packed_logprobs(call, ids, mask, capacity=capacity, window=window, check=False)
        torch.testing.assert_close(found, logprobs_one_by_one(net, ids, mask), rtol=1e-10, atol=1e-10)


@functools.cache
def windowed():
    """Full attention and windows of 5 in turn."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1,
                         attn_implementation="sdpa")  # fmt: skip
    return Qwen2ForCausalLM(config).double().eval()
