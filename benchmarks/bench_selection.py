"""Packed against padded: forward and backward of one micro-batch of long-tailed lengths, on a small Llama."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bandpo.selection import density, pack_rows, packed_logprobs, window_pack


def test_packed_forward_and_backward(paired, report):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    lengths = torch.exp(4.0 + 0.8 * torch.randn(64)).long().clamp(4, 256)
    mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
    ids = torch.randint(1, 512, mask.shape) * mask

    def padded():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        (chosen * mask[:, 1:]).sum().backward()

    def packed():
        call = lambda **kwargs: model(**kwargs, use_cache=False).logits  # noqa: E731
        packed_logprobs(call, ids, mask, capacity=512).sum().backward()

    found = paired({"padded": padded, "packed": packed}, rounds=7)
    bins = pack_rows(ids, mask, capacity=512).input_ids
    note = f"density {mask.sum() / mask.numel():.2f} padded, {mask.sum() / bins.numel():.2f} packed"
    report("Padded over packed micro-batch, forward and backward", found["padded"] / found["packed"], "x", "", note)


def test_density(report):
    torch.manual_seed(0)
    lengths = torch.exp(5.6 + 0.8 * torch.randn(2000)).long().clamp(1, 1024).tolist()
    for window in (1, 8, 32):
        value = density(lengths, window_pack(lengths, 2048, window), 2048)
        report(f"Density of window packing, window {window}", value, "", ">= 0.97" if window >= 8 else "")
