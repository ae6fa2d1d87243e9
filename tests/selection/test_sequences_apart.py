"""SDPA of packed sequences without a mask of the row: what a layer gets, layers that are computed again, and refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from bandpo.integrations.trl.apart import Apart
from bandpo.integrations.trl.packing import Layout, probe_packing
from bandpo.selection import pack_rows

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTHS = (70, 3, 41, 1, 40, 18, 64)


def llama(attention="sdpa"):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation=attention)).double()


def windowed(attention="sdpa"):
    """A layer with full attention and one with a window of 20 tokens."""
    torch.manual_seed(0)
    options = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, **options, attn_implementation=attention)).double()


def packed(lengths=LENGTHS, capacity=90):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(1, 40, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return ids, mask, pack_rows(ids, mask, capacity=capacity)


def logits_of(model, batch):
    layout = Layout(batch, model.config)
    return batch_of(batch, layout.rows(layout.forward(model).logits))


def batch_of(batch, rows):
    return [rows[batch.sequence_ids == i] for i in range(len(batch.mask))]


def gradient_of(model, found):
    model.zero_grad()
    weights = torch.Generator().manual_seed(1)
    sum((x * torch.randn(x.shape, generator=weights, dtype=x.dtype)).sum() for x in found).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of SDPA."""
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **options):
        seen.append((tuple(query.shape), attn_mask, options))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return seen


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_batches_hold_every_sequence_once_and_little_padding(lengths):
    lengths = tuple(sorted(lengths, reverse=True))
    at, found = 0, []
    for start, part in Apart(lengths, 1.0).batches():
        assert start == at and (part[-1] >= 0.75 * part[0] or part[0] <= 16)
        at, found = at + sum(part), found + list(part)
    assert tuple(found) == lengths


def test_full_attention_gets_no_mask(calls):
    _, _, batch = packed()
    logits_of(llama(), batch)
    assert calls and all(mask is None for _, mask, _ in calls)
    assert all(options["is_causal"] for shape, _, options in calls if shape[2] > 1)
    padded = sum(shape[0] * shape[2] for shape, _, _ in calls) / SMALL["num_hidden_layers"]
    assert padded <= 4 / 3 * sum(LENGTHS) + 16


def test_a_window_gets_a_mask_of_the_longest_sequence_and_only_where_it_cuts(calls):
    _, _, batch = packed()
    logits_of(windowed(), batch)
    masks = [(shape, mask) for shape, mask, _ in calls if mask is not None]
    assert {shape[2] for shape, _ in masks} == {70, 41}  # full attention and the short sequences have none
    assert all(mask.shape[-2:] == (shape[2], shape[2]) and mask.shape[0] == 1 for shape, mask in masks)


@pytest.mark.parametrize("make", [llama, windowed])
def test_it_is_the_masked_row_in_value_and_gradient(make):
    _, _, batch = packed()
    model = make()
    found = logits_of(model, batch)
    # transformers' own way: rows, and the mask that it makes from the positions
    rows = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    for one, other in zip(found, batch_of(batch, rows), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    gradient, expected = gradient_of(model, found), gradient_of(model, batch_of(batch, rows))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [llama, windowed])
def test_layers_that_are_computed_again_in_the_backward_pass(make, reentrant):
    _, _, batch = packed()
    model = make().train()
    expected = gradient_of(model, logits_of(model, batch))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert torch.equal(gradient_of(model, logits_of(model, batch)), expected)


def test_other_calls_are_as_they_were():
    ids, mask, batch = packed()
    model = windowed().eval()
    before = model(input_ids=ids, attention_mask=mask.long()).logits
    logits_of(model, batch)
    assert torch.equal(model(input_ids=ids, attention_mask=mask.long()).logits, before)
    text = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids[:2, :3], **text), windowed().eval().generate(ids[:2, :3], **text))


@pytest.mark.parametrize(
    ("model", "limit", "what"),
    [
        (llama("eager"), 60_000, r"for \d rows of \d+ tokens"),
        (windowed(), 70 * 70 - 1, "for windows of 20 in a sequence of 70 tokens"),
    ],
)
def test_a_mask_that_is_too_large_is_refused_with_the_remedy(model, limit, what):
    _, _, batch = packed()
    with pytest.raises(
        ValueError, match=rf"{what} would take .* GiB.*Lower packing_tokens.*sdpa.*raise packing_mask_gib"
    ):
        Layout(batch, model.config, limit).forward(model)


def test_full_attention_has_no_limit():
    model = llama()
    _, _, batch = packed()
    Layout(batch, model.config, 1.0).forward(model)


def test_attention_to_other_tokens_is_refused():
    """A model that puts tokens of its own into the row."""
    model = llama()
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (
            args,
            {**kwargs, "input_ids": torch.cat([kwargs["input_ids"]] * 2, 1), "position_ids": None},
        ),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match="attends to other tokens than those of its row"):
        probe_packing(model, lambda text, **_: {"input_ids": [1, 2, 3]}, torch.device("cpu"))
