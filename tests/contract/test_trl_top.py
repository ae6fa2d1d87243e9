"""Log-probs of the top-K tokens with gradient, from the pass that scores the sampled ones: values, gradients, memory."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from bandpo.integrations.trl import top
from bandpo.integrations.trl.rollout import top_logprobs
from bandpo.integrations.trl.top import columns, top_scores
from trl_runs import named, rollout

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*pin_memory", "ignore:The trust region of"
)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip


@pytest.mark.parametrize("at_once", [2**24, 14, 1])
def test_columns_are_those_of_the_softmax_and_so_are_their_gradients(at_once, monkeypatch):
    monkeypatch.setattr(top, "_AT_ONCE", at_once)
    g = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(3, 4, 7, generator=g, dtype=torch.float64)).requires_grad_()
    ids = torch.randint(0, 7, (3, 4, 3), generator=g)  # with columns that come twice
    weight, other = torch.randn(3, 4, 3, generator=g).double(), torch.randn(3, 4, generator=g).double()

    def gradient(values, entropy):
        return torch.autograd.grad((values * weight).sum() + (entropy * other).sum(), x)[0]

    logp = (x / 0.7).log_softmax(-1)
    want = logp.gather(-1, ids), -(logp.exp() * logp).sum(-1)
    found = columns(x, ids, 1 / 0.7)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient(*found), gradient(*want), rtol=1e-13, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: columns(x, ids, 1 / 0.7), (x,))


def test_a_token_that_cannot_be_drawn_leaves_the_gradient_finite():
    x = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    values, entropy = columns(x, torch.tensor([[0, 1]]))
    (values.sum() + entropy.sum()).backward()
    assert entropy.isfinite().all() and x.grad.isfinite().all() and x.grad[0, 2] == 0


def test_narrow_logits_are_scored_in_float32_and_kept_once():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, 1000, generator=g).bfloat16().requires_grad_()
    ids = logits.detach().topk(4).indices
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        values, _ = columns(logits, ids, 1.25)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, (1.25 * logits.float()).log_softmax(-1).gather(-1, ids), rtol=0, atol=1e-6)
    assert sum(n >= logits.numel() for n in kept) == 1  # the model's own logits
    values.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def scored(trainer, inputs, ids, **how):
    ids_ = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return top_scores(trainer, trainer.model, ids_, attention, inputs["completion_ids"].shape[1], ids, **how)


def gradient_of(trainer, value):
    trainer.model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("changes", [{}, {"packing": True}], ids=["padded", "packed"])
def test_one_pass_has_the_log_probs_and_entropies_of_trl_and_the_top_k(changes, tokenizer, prompts, tmp_path):
    def model():
        torch.manual_seed(0)
        return MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), sliding_window=4, **SMALL))

    inputs = rollout(tokenizer)
    inputs["prompt_mask"][2, :2] = 0  # padding on the left too
    plain = named(tmp_path, model, tokenizer, prompts, "dppo-topk-kl", temperature=0.7)
    ours = named(tmp_path, model, tokenizer, prompts, "dppo-topk-kl", temperature=0.7, **changes)
    valid = inputs["completion_mask"] != 0
    want, ids = top_logprobs(plain, plain.model, inputs, None, 5)
    found = scored(ours, inputs, ids, compute_entropy=True)
    torch.testing.assert_close(found.top[valid], want[valid], rtol=1e-5, atol=1e-5)
    both = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    theirs = plain._get_per_token_logps_and_entropies(plain.model, both, attention, 6, compute_entropy=True)
    for a, b in zip((found.logprobs, found.entropy), theirs, strict=False):
        torch.testing.assert_close(a[valid], b[valid], rtol=1e-5, atol=1e-5)
        assert (a[~valid] == 0).all()
    # the gradient of all columns, against autograd through the plain logits
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(*valid.shape, 6, generator=g) * valid.unsqueeze(-1)
    logits = plain.model(both, attention_mask=attention).logits[:, 3:-1] / 0.7
    columns_ = torch.cat([inputs["completion_ids"].unsqueeze(-1), ids], -1)
    want = gradient_of(plain, (logits.log_softmax(-1).gather(-1, columns_) * weight).sum())
    mine = torch.cat([found.logprobs.unsqueeze(-1), found.top], -1)
    got = gradient_of(ours, (mine * weight).sum())
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * want.abs().max().item())
    assert (found.top[~valid].exp().sum(-1) < 1.001).all()  # a distribution at padding too


def test_the_router_loss_is_trl_s(tokenizer, prompts, tmp_path):
    def model():
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), num_local_experts=2, **SMALL))

    trainer = named(tmp_path, model, tokenizer, prompts, "dppo-topk-kl")
    inputs = rollout(tokenizer)
    ids = torch.zeros(8, 6, 2, dtype=torch.int64)
    found = scored(trainer, inputs, ids, compute_aux_loss=True)
    both = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    theirs = trainer._get_per_token_logps_and_entropies(trainer.model, both, attention, 6, compute_aux_loss=True)
    torch.testing.assert_close(found.router_loss, theirs[2], rtol=1e-5, atol=1e-6)
    assert found.entropy is None


def test_images_are_refused(make_model, tokenizer, prompts, tmp_path):
    trainer = named(tmp_path, make_model, tokenizer, prompts, "dppo-topk-kl")
    with pytest.raises(ValueError, match=r"'dppo-topk-kl' scores the top-K tokens of text.*bandpo-kl"):
        top_logprobs(trainer, trainer.model, rollout(tokenizer) | {"pixel_values": torch.zeros(1)}, None, 5)
