"""Device and precision that a run chooses, and what it refuses; machines with a GPU are described, since there is none here."""

import itertools

import pytest
import torch

from bandpo.train import compute
from bandpo.train.compute import SMALLEST_IN_BF16, Machine, choose, count_parameters, this_machine, without_gpu

CPU, PLAIN = Machine(cpu_bf16="AMX"), Machine()
GPU = Machine("cuda", "NVIDIA H100", bf16=True, cpu_bf16="AMX")
OLD = Machine("cuda", "Tesla V100", bf16=False)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def never():
    pytest.fail("the size decides nothing here")


@pytest.mark.parametrize(
    ("machine", "asked", "size", "use_cpu", "bf16", "said"),
    [
        (GPU, {}, never, False, True, "computing on NVIDIA H100 in bfloat16, with weights in float32 (it has bfloat16)"),
        (GPU, {"bf16": False}, never, False, False, "on NVIDIA H100 in float32 (as set)"),
        (GPU, {"fp16": True}, never, False, False, "in float16 (as set)"),
        (GPU, {"use_cpu": True}, lambda: 10**9, True, True, "on the CPU (as set) in bfloat16"),
        (OLD, {}, never, False, False, "on Tesla V100 in float32 (it has no instructions for bfloat16)"),
        (CPU, {}, lambda: 135_000_000, True, True, "(there is no GPU) in bfloat16, with weights in float32 (the CPU has AMX"),
        (CPU, {}, lambda: SMALLEST_IN_BF16, True, True, "faster from 4M parameters on: 4M"),
        (CPU, {}, lambda: SMALLEST_IN_BF16 - 1000, True, False, "in float32 (the CPU has AMX, which is slower below 4M"),
        (CPU, {}, lambda: None, True, False, "the size of the model is not known"),
        (CPU, {"fp16": False}, lambda: 10**9, True, True, "in bfloat16"),
        (PLAIN, {}, never, True, False, "in float32 (no instructions for bfloat16 were found that torch uses)"),
        (PLAIN, {"bf16": True}, never, True, True, "as set; no instructions for it were found on this CPU"),
        (PLAIN, {"bf16": None, "use_cpu": None}, never, True, False, "in float32"),
    ],
)  # fmt: skip
def test_what_is_left_open_is_chosen_and_said(machine, asked, size, use_cpu, bf16, said):
    found = choose(asked, size, machine)
    assert (found.use_cpu, found.bf16, found.fp16) == (use_cpu, bf16, bool(asked.get("fp16")))
    assert said in found.line and "\n" not in found.line
    assert found.line.endswith(". Override: --use_cpu, --bf16, --fp16 true|false")


@pytest.mark.parametrize(
    ("machine", "asked", "message"),
    [
        (CPU, {"use_cpu": False}, "use_cpu=False: there is no accelerator .* leave use_cpu out"),
        (CPU, {"fp16": True}, "fp16=True: a CPU cannot train in float16; set bf16: true"),
        (GPU, {"fp16": True, "use_cpu": True}, "fp16=True: a CPU cannot"),
        (OLD, {"bf16": True}, "bf16=True: Tesla V100 has no bfloat16 .* set fp16: true, or bf16: false"),
    ],
)
def test_what_the_machine_cannot_do_is_refused_with_the_fix(machine, asked, message):
    with pytest.raises(ValueError, match=message):
        choose(asked, never, machine)


@pytest.mark.parametrize(
    ("asked", "bf16", "said"),
    [
        ({"fp16": True}, False, "in float16 (as set). fp16=True needs a GPU; not checked here"),
        ({"use_cpu": False}, False, "in the precision that it has. use_cpu=False needs a GPU; not checked here"),
        ({"use_cpu": False, "bf16": True}, True, "in bfloat16 (as set). use_cpu=False needs a GPU; not checked here"),
        ({"use_cpu": False, "bf16": False}, False, "in float32 (as set). use_cpu=False needs a GPU; not checked here"),
        ({"use_cpu": False, "fp16": True}, False, "use_cpu=False and fp16=True need a GPU; not checked here"),
    ],
)
def test_a_dry_run_without_a_gpu_says_what_it_could_not_check(asked, bf16, said):
    found = without_gpu(asked, CPU)
    assert found.options == {"use_cpu": True, "bf16": bf16, "fp16": False}
    assert found.line.startswith("computing on a GPU in ") and said in found.line
    assert without_gpu(asked, GPU) is None


@pytest.mark.parametrize(
    "asked", [{}, {"bf16": True}, {"fp16": False}, {"use_cpu": True, "fp16": True}, {"bf16": True, "fp16": True}]
)
def test_a_dry_run_checks_here_what_asks_for_no_gpu_or_is_wrong_anywhere(asked):
    assert without_gpu(asked, CPU) is None


def test_what_is_set_is_never_changed_and_then_nothing_is_said():
    for machine, values in itertools.product((CPU, PLAIN, GPU, OLD), itertools.product((True, False), repeat=2)):
        asked = dict(zip(("use_cpu", "bf16"), values, strict=True))
        try:
            found = choose(asked, never, machine)
        except ValueError:
            assert machine is OLD or not asked["use_cpu"]
            continue
        assert (found.use_cpu, found.bf16, found.line) == (*values, None)


def test_accelerates_own_choice_of_the_cpu_counts(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose({}, lambda: 10**9, GPU).use_cpu
    assert not choose({"use_cpu": False}, never, GPU).use_cpu


@pytest.mark.parametrize(("capability", "bf16"), [((9, 0), True), ((8, 0), True), ((7, 5), False)])
def test_this_machine_with_a_gpu(capability, bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = this_machine()
    assert (found.accelerator, found.name, found.bf16) == ("cuda", "a GPU", bf16)
    assert choose({}, never, found).device == torch.device("cuda")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert this_machine().accelerator is None
        assert choose({}, lambda: 0, this_machine()).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "name"),
    [("fpu avx512_bf16 amx_bf16", "AMX"), ("fpu avx512_bf16", "AVX-512 BF16"), ("fpu avx512f", None), (None, None)],
)
def test_this_cpu(flags, name, monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor : 0\nflags\t\t: {flags}\nprocessor : 1\nflags : x\n")
    monkeypatch.setattr(compute, "_CPU_FILE", file)
    assert this_machine().cpu_bf16 == name
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert this_machine().cpu_bf16 is None


def test_parameters_are_counted_without_weights(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    expected = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert count_parameters(str(tmp_path), local=True) == expected
    (tmp_path / "x.gguf").write_bytes(bytes(4000))
    assert count_parameters(str(tmp_path / "x.gguf"), local=True) == 1000
    assert count_parameters("nobody/nothing", local=True) is None
    (tmp_path / "config.json").write_text("{}")
    assert count_parameters(str(tmp_path), local=True) is None
