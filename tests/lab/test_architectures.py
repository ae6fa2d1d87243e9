"""The stack against transformers' own models: grouped heads, tied embeddings, biases, norms of queries and keys, padding."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bandpo.lab.comparison import decoding
from bandpo.lab.comparison.architecture import FAMILIES, shape_of
from bandpo.lab.comparison.decoding import FixedStep
from bandpo.lab.comparison.stack import Adam, Stack

END, PAD, VOCABULARY = 1, 0, 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def config(kind, **changes):
    """Small configs: SmolLM2 has 9 heads, 3 of them for keys, and a tied head; Qwen2 has biases; Qwen3 has norms."""
    given = {**SMALL, **changes}
    if kind == "smollm2":
        rope = {"rope_type": "default", "rope_theta": 1e5}
        size = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}
        return LlamaConfig(**given | size, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=rope)
    if kind == "llama, all biases":
        return LlamaConfig(**given, attention_bias=True, mlp_bias=True, head_dim=8)
    if kind == "llama, one key head":
        return LlamaConfig(**given | {"num_key_value_heads": 1})
    if kind == "llama3 rope":
        return LlamaConfig(**given, rope_parameters=LLAMA3)
    if kind == "linear rope":
        return LlamaConfig(**given, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5})
    if kind == "mistral":
        return MistralConfig(**given, sliding_window=None)
    if kind == "qwen2":
        rope = {"rope_type": "default", "rope_theta": 1e6}
        return Qwen2Config(**given, tie_word_embeddings=True, rope_parameters=rope)
    assert kind == "qwen3"
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen3Config(**given | {"head_dim": 10}, tie_word_embeddings=False, rope_parameters=rope)


KINDS = (
    *("smollm2", "llama, all biases", "llama, one key head", "llama3 rope", "linear rope"),
    *("mistral", "qwen2", "qwen3"),
)
CLASSES = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}


class Norm(nn.Module):
    """The RMS norm of transformers without its rounding to float32, so that float64 can be compared as such."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.epsilon).rsqrt())


def build(kind, seed, dtype=torch.float32, **changes):
    """A random model; norms and biases, which start as ones and zeros, are random as well."""
    made = config(kind, **changes)
    model = CLASSES[made.model_type](made).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.25 + (1 if "norm" in name else 0))
    rope = model.model.rotary_emb
    if rope.rope_type == "default":  # transformers writes 1 / θ^x where the stack has θ^-x: the last bits differ
        size = len(rope.inv_freq) * 2
        ours = rope.config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        torch.testing.assert_close(rope.inv_freq, ours, rtol=3e-7, atol=0)
        rope.inv_freq.copy_(ours)
    if dtype == torch.float64:
        frequencies = rope.inv_freq.clone()
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child).__name__.endswith("RMSNorm"):
                    setattr(module, name, Norm(child))
        model = model.double()
        model.model.rotary_emb.inv_freq = frequencies  # computed and used in float32 everywhere
    return model


def batch(runs=2, rows=6, width=5, new=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(2, VOCABULARY, (runs, rows, width), generator=g)
    completions = torch.randint(2, VOCABULARY, (runs, rows, new), generator=g)
    lengths = torch.randint(1, width + 1, (runs, rows), generator=g)
    lengths[:, 0], lengths[:, 1] = width, 1
    mask = torch.arange(width) >= width - lengths.unsqueeze(-1)
    return prompts.where(mask, PAD), completions, mask


def hf_logprobs(model, prompts, completions, mask=None):
    ids = torch.cat([prompts, completions], 1)
    given = {}
    if mask is not None:
        attention = torch.cat([mask, torch.ones_like(completions, dtype=torch.bool)], 1).long()
        given = {"attention_mask": attention, "position_ids": (attention.cumsum(1) - 1).clamp_min(0)}
    logits = model(ids, **given).logits[:, prompts.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, completions.unsqueeze(-1)).squeeze(-1)


def check_gradients(gradients, run, model, rtol, atol):
    named = dict(model.named_parameters())
    assert set(gradients) == set(named)
    for name, p in named.items():
        ours = gradients[name][run].clone()
        if "embed" in name:  # transformers gives the pad token's row no gradient as an input
            ours[PAD] = p.grad[PAD]
        scale = p.grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(ours, p.grad, rtol=rtol, atol=atol * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_are_those_of_transformers(kind, padded, dtype):
    models = [build(kind, seed, dtype) for seed in (1, 2)]
    stack = Stack.load(models)
    assert not models[0].config.tie_word_embeddings or "lm_head.weight" not in stack.weights
    prompts, completions, mask = batch()
    given = mask if padded else None
    for w in stack.weights.values():
        w.requires_grad_()
    ours = stack.logprobs(prompts, completions, prompt_mask=given)
    assert ours.dtype == dtype
    weights = (
        torch.linspace(0.5, 1.5, ours[0].numel()).view(ours[0].shape).to(dtype)
    )  # no token's gradient hides another's
    gradients = torch.autograd.grad((ours * weights).sum(), list(stack.weights.values()))
    gradients = dict(zip(stack.weights, gradients, strict=True))
    tight = dtype == torch.float64
    for run, model in enumerate(models):
        theirs = hf_logprobs(model, prompts[run], completions[run], mask[run] if padded else None)
        torch.testing.assert_close(ours[run], theirs, rtol=0, atol=1e-12 if tight else 5e-5)
        (theirs * weights).sum().backward()
        check_gradients(gradients, run, model, *((1e-9, 1e-12) if tight else (2e-3, 5e-5)))


def test_padding_changes_nothing():
    """A row with padding has the log-probs and the gradient of the same row without."""
    stack = Stack.load([build("qwen3", 1, torch.float64)])
    for w in stack.weights.values():
        w.requires_grad_()
    prompts, completions, _ = batch(runs=1, rows=3)
    wide = torch.cat([torch.full((1, 3, 4), 17), prompts], -1)
    mask = torch.cat([torch.zeros(1, 3, 4, dtype=torch.bool), torch.ones_like(prompts, dtype=torch.bool)], -1)
    found = []
    for logp in (stack.logprobs(prompts, completions), stack.logprobs(wide, completions, prompt_mask=mask)):
        found.append((logp, *torch.autograd.grad(logp.sum(), list(stack.weights.values()))))
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=0, atol=1e-12 * plain.abs().max().item())


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_most_likely_tokens_are_those_of_generate(kind, padded, fixed):
    """At a temperature near 0 the sampler takes the most likely token, and `generate` does so by itself."""
    models = [build(kind, seed) for seed in (1, 2)]
    stack = Stack.load(models)
    prompts, _, mask = batch(width=5)
    new, repeats = 9, 2
    noise = torch.rand(2, 6 * repeats, new, generator=torch.Generator().manual_seed(3))
    given = mask if padded else None
    made = stack.sample(
        prompts, noise, end=END, pad=PAD, repeats=repeats, temperature=1e-7, prompt_mask=given, fixed=fixed
    )
    for run, model in enumerate(models):
        attention = mask[run].long() if padded else torch.ones_like(prompts[run])
        theirs = model.generate(
            prompts[run], attention_mask=attention, max_new_tokens=new, do_sample=False, pad_token_id=PAD
        )[:, prompts.shape[-1] :]
        theirs = nn.functional.pad(theirs, (0, new - theirs.shape[1]), value=PAD)
        assert torch.equal(made.tokens[run, ::repeats], theirs) and torch.equal(made.tokens[run, 1::repeats], theirs)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", ["smollm2", "qwen3"])
def test_the_sampler_reports_the_log_probs_of_the_policy(kind, fixed):
    stack = Stack.load([build(kind, seed, torch.float64) for seed in (1, 2)])
    prompts, _, mask = batch()
    noise = torch.rand(2, 18, 8, generator=torch.Generator().manual_seed(3))
    made = stack.sample(prompts, noise, end=END, pad=PAD, repeats=3, temperature=0.8, prompt_mask=mask, fixed=fixed)
    assert made.logprobs.dtype == torch.float64
    full, full_mask = prompts.repeat_interleave(3, 1), mask.repeat_interleave(3, 1)
    again = stack.logprobs(full, made.tokens, 0.8, full_mask)
    torch.testing.assert_close(made.logprobs[made.mask], again[made.mask], rtol=0, atol=1e-12)
    plain = stack.sample(prompts, noise, end=END, pad=PAD, repeats=3, temperature=0.8, prompt_mask=mask)
    assert torch.equal(made.tokens, plain.tokens) and torch.equal(made.mask, plain.mask)


def test_weights_go_back_into_a_model_with_a_tied_head():
    models = [build("smollm2", seed) for seed in (1, 2)]
    stack, target = Stack.load(models), build("smollm2", 9)
    stack.write(1, target)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), models[1].parameters(), strict=True))
    assert target.lm_head.weight.data_ptr() == target.model.embed_tokens.weight.data_ptr()


def test_half_precision_is_near_transformers_and_not_updated():
    models = [build("smollm2", seed).bfloat16() for seed in (1, 2)]
    stack = Stack.load(models)
    prompts, completions, _ = batch()
    ours = stack.logprobs(prompts, completions)
    assert ours.dtype == torch.float32  # the log-softmax is that of float32
    for run, model in enumerate(models):
        theirs = hf_logprobs(model.float(), prompts[run], completions[run])
        assert (ours[run] - theirs).abs().mean() < 0.1
    noise = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(3))
    made = stack.sample(prompts, noise, end=END, pad=PAD)
    assert made.logprobs.dtype == torch.float32 and made.logprobs.isfinite().all()
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is torch\.bfloat16; use \.float\(\)"):
        Adam(stack.weights, torch.ones(2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (list, "at least one model"),
        (lambda: [build("mistral", 1), build("qwen2", 1)], "one architecture"),
        (lambda: [build("qwen2", 1), build("qwen2", 1, rms_norm_eps=1e-3)], "one architecture"),
        (lambda: [build("qwen2", 1), build("qwen2", 1, vocab_size=62)], "same weights"),
        (lambda: [build("qwen2", 1), build("qwen2", 1).double()], "same weights"),
        (lambda: [LlamaForCausalLM(LlamaConfig(**SMALL, hidden_act="gelu"))], "activation silu only, got.*gelu"),
        (
            lambda: [MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8))],
            "full attention only.*sliding_window=8",
        ),
        (
            lambda: [
                Qwen3ForCausalLM(Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1))
            ],
            "full attention only.*sliding_attention",
        ),
        (
            lambda: [
                LlamaForCausalLM(
                    LlamaConfig(**SMALL, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
                )
            ],
            "rotary embeddings default, linear, llama3.*yarn",
        ),
    ],
)
def test_what_the_stack_does_not_have_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        Stack.load(make())


def test_another_family_is_refused_by_name():
    given = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match=f"type 'gpt2'; it has one for {', '.join(FAMILIES)}"):
        shape_of([AutoModelForCausalLM.from_config(given)])


def test_prompts_are_padded_on_the_left_by_a_bool_mask():
    stack = Stack.load([build("qwen2", 1)])
    prompts, completions, mask = batch(runs=1)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        stack.sample(prompts, torch.rand(1, 6, 2), end=END, pad=PAD, prompt_mask=mask.flip(-1))
    with pytest.raises(ValueError, match=r"bool tensor is required, got torch\.int64"):
        stack.logprobs(prompts, completions, prompt_mask=mask.long())


class Recorded(TorchDispatchMode):
    """A CUDA graph in miniature: while it records, nothing that exists is written to; a replay uses the same addresses."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        assert not name.startswith(("_local_scalar_dense", "nonzero", "_to_copy", "lift")), f"{name} needs the host"
        written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
        if any(written):
            self.steps.append((func, args, kwargs, None))
            return args[written.index(True)]
        out = func(*args, **kwargs)
        if not any(r.alias_info is not None for r in func._schema.returns):  # no view
            self.steps.append((func, args, kwargs, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.steps:
            made = func(*args, **kwargs)
            if out is not None:
                for old, new in zip(*((x if isinstance(x, tuple) else (x,)) for x in (out, made)), strict=True):
                    old.copy_(new)


def pretend_graphs(monkeypatch, fails=False):
    """`FixedStep` with the recorder in the place of CUDA's graphs, and what was recorded."""
    made = []

    @contextlib.contextmanager
    def record(graph):
        made.append(graph)
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", record)
    real = FixedStep.__init__

    def init(self, *args):
        real(self, *args)
        self._captures = True

    monkeypatch.setattr(FixedStep, "__init__", init)
    return made


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["smollm2", "qwen3", "llama3 rope", "llama, all biases"])
def test_a_replayed_step_is_the_step(kind, padded, monkeypatch):
    """The recorder takes the place of CUDA, which the CPU does not have: same fixed addresses, no write while it records."""
    stack = Stack.load([build(kind, seed) for seed in (1, 2)])
    prompts, _, mask = batch()
    given = {"end": END, "pad": PAD, "repeats": 2, "prompt_mask": mask if padded else None}
    noise = torch.rand(2, 12, 9, generator=torch.Generator().manual_seed(3))
    eager = stack.sample(prompts, noise, fixed=True, **given)
    growing = stack.sample(prompts, noise, **given)
    graphs = pretend_graphs(monkeypatch)
    replayed = stack.sample(prompts, noise, fixed=True, **given)
    assert len(graphs) == 1 and len(graphs[0].steps) > 50
    assert all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))
    assert torch.equal(growing.tokens, eager.tokens)
    torch.testing.assert_close(growing.logprobs, eager.logprobs, rtol=0, atol=1e-5)


def test_a_graph_that_cannot_be_captured_leaves_the_step_without_one(monkeypatch):
    stack = Stack.load([build("smollm2", 1)])
    prompts, _, _ = batch(runs=1)
    noise = torch.rand(1, 6, 9, generator=torch.Generator().manual_seed(3))
    eager = stack.sample(prompts, noise, end=END, pad=PAD, fixed=True)
    graphs = pretend_graphs(monkeypatch, fails=True)
    with pytest.warns(UserWarning, match=r"no CUDA graph could be captured.*stream is capturing"):
        made = stack.sample(prompts, noise, end=END, pad=PAD, fixed=True)
    assert len(graphs) == 1
    assert all(torch.equal(a, b) for a, b in zip(eager, made, strict=True))


@pytest.mark.parametrize("fixed", [False, True])
def test_many_completions_of_long_prompts_have_no_more_than_the_tokens_so_far(fixed):
    """A mutation of the cache's mask would show here: attention over what is not written yet."""
    stack = Stack.load([build("smollm2", 1, torch.float64)])
    prompts, _, _ = batch(runs=1, width=decoding.LONG)
    noise = torch.rand(1, 12, 5, generator=torch.Generator().manual_seed(3))
    made = stack.sample(prompts, noise, end=-1, pad=PAD, repeats=2, fixed=fixed)
    again = stack.logprobs(prompts.repeat_interleave(2, 1), made.tokens)
    torch.testing.assert_close(made.logprobs, again, rtol=0, atol=1e-12)
