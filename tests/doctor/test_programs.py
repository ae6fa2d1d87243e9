"""Python scripts, notebooks and launch lines: literals are read exactly, the rest is named, and nothing runs."""

import ast
import contextlib
import json
import re
import time
from pathlib import Path

import pytest
import torch
from trl import GRPOConfig

from bandpo import Clip
from bandpo.cli import main
from bandpo.doctor import examine_setup
from bandpo.doctor.command import read_config
from bandpo.doctor.python_source import MAX_SOURCE_BYTES, UNKNOWN, Source
from bandpo.doctor.swift import DEFAULTS, read_swift
from bandpo.doctor.trl import CHANGED_DEFAULTS, UNSLOTH_DEFAULTS, read_trl, setup_of
from bandpo.integrations.trl import BandGRPOConfig

HEAD = "from trl import GRPOConfig, GRPOTrainer\n"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def read(text, name="train.py", *overrides, **options):
    Path(name).write_text(text)
    return read_config(Path(name), overrides, **options)


def notebook(*cells, language="python"):
    found = [{"cell_type": "code", "source": cell.splitlines(keepends=True), "outputs": []} for cell in cells]
    return json.dumps({"cells": found, "metadata": {"kernelspec": {"language": language}}, "nbformat": 4})


# ---- literals of Python


@pytest.mark.parametrize(
    "text",
    ["X = 1", "X = -1.5e-6", "A = 4\nX = A * 2 + 1", "A = 1\nA = 2\nX = A", "A, B = 3, 'b'\nX = B", "A: int = 5\nX = A",
     "X = {'a': [1, 2], 'b': None}", "X = dict(a=1)['a']", "X = [1, 2][1]", "X = 2 ** 10 // 3 % 7", "X = not False",
     "X = 1 if True else 2", "X = float('1e-6')", "with open('x') as f:\n    X = 3", "if 1:\n    A = 7\nX = A",
     "class C:\n    a = 0.25\nX = C.a", "A = 1\ndef f():\n    global B\n    B = 2\nX = A", "A = (B := 4)\nX = B",
     "try:\n    A = 1\nfinally:\n    pass\nX = A", "D = {'a': 1}\nX = D['a']"],
)  # fmt: skip
def test_what_is_known_is_what_python_gives(text):
    """Against Python itself, on sources that do nothing else."""
    source = Source([("", text)])
    bindings, home = source.bound("X", source.module, 1 << 60)
    value = source.values(bindings[0].value, home, bindings[0].time)
    Path("x").write_text("")
    names = {}
    exec(compile(text, "x", "exec"), names)  # our own texts
    assert value == names["X"]
    assert type(value) is type(names["X"])


@pytest.mark.parametrize(
    "text",
    ["X = f()", "X = f'{1}'", "A = 1\nif y:\n    A = 2\nX = A", "for A in (1, 2):\n    X = A", "A = 1\nA += 1\nX = A",
     "import os\nX = os.environ.get('A', 1)", "A = 1\nfrom m import *\nX = A", "A = 1\nexec('')\nX = A",
     "A = 1\nglobals()['A'] = 2\nX = A", "D = {'a': 1}\nD['a'] = 2\nX = D['a']", "D = {'a': 1}\nD.update(b)\nX = D['a']",
     "class C:\n    a = 1\nC.a = 2\nX = C.a", "class C:\n    a = 1\nsetattr(C, n, 2)\nX = C.a", "X = 9**9**9**9", "X = 1 / 0",
     "X = 'a' * 10**9", "X = 1 << 10**9", "A = 1\ndel A\nX = A", "try:\n    A = 1\nexcept E:\n    A = 2\nX = A",
     "A = 1\ndef f():\n    global A\n    A = 2\nX = A", "X = X", "A = B\nB = A\nX = A", "X = (lambda: 1)()", "X = undefined"],
)  # fmt: skip
def test_what_is_no_literal_is_not_known(text):
    source = Source([("", text)])
    bindings, home = source.bound("X", source.module, 1 << 60)
    found = [source.values(b.value, home, b.time) for b in bindings if isinstance(b.value, ast.expr)]
    assert all(value is UNKNOWN for value in found)


# ---- scripts of TRL


def test_a_script_is_read_as_its_yaml():
    """The same options as keyword arguments and as YAML give the same settings."""
    options = {"num_generations": 4, "num_iterations": 2, "beta": 0.04, "epsilon_high": 0.28, "temperature": 0.7,
               "loss_type": "dr_grpo", "top_p": 0.9, "use_vllm": True, "learning_rate": 1e-6}  # fmt: skip
    script = read(HEAD + f"GRPOTrainer(args=GRPOConfig('out', {', '.join(f'{k}={v!r}' for k, v in options.items())}))")
    assert script == read("".join(f"{k}: {v}\n" for k, v in options.items()), "grpo.yaml")
    args = GRPOConfig("out", use_cpu=True, bf16=False, **options)
    assert script.kl_coef == args.beta
    assert script.objective.bounds == Clip(args.epsilon, args.epsilon_high)
    assert script.steps == args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    assert script.top_p == args.top_p
    assert (script.engine, script.learning_rate) == ("vLLM", 1e-6)


@pytest.mark.parametrize(
    ("text", "beta"),
    [("N = 0.1\nGRPOConfig(beta=N * 2)", 0.2), ("d = dict(beta=0.3)\nGRPOConfig(**d)", 0.3),
     ("d = {'beta': 0.1}\nd['beta'] = 0.2\nGRPOConfig(**{**d, 'epsilon': 0.1})", 0.2),
     ("a = GRPOConfig(beta=0.1)\na.beta = 0.4\nGRPOTrainer(args=a)", 0.4),
     ("a = GRPOConfig(beta=0.1)\nsetattr(a, 'beta', 0.4)\nGRPOTrainer(args=a)", 0.4),
     ("a = GRPOConfig(beta=0.1)\nGRPOTrainer('m', f, a)\na.beta = 0.4", 0.1),
     ("from dataclasses import replace\na = GRPOConfig(beta=0.1)\nGRPOTrainer(args=replace(a, beta=0.5))", 0.5),
     ("a = GRPOConfig(beta=0.1)\nb = GRPOConfig(beta=0.2)\nGRPOTrainer(args=b)", 0.2),
     ("import trl\ntrl.GRPOConfig(beta=0.6)", 0.6), ("from trl import GRPOConfig as C\nC(beta=0.6)", 0.6),
     ("from dataclasses import dataclass\n@dataclass\nclass My(GRPOConfig):\n    beta: float = 0.7\nMy(epsilon=0.1)", 0.7),
     ("@dataclass\nclass A(GRPOConfig):\n    beta: float = 0.7\n@dataclass()\nclass B(A):\n    epsilon: float = 0.1\nB()", 0.7),
     ("GRPOTrainer(model='m', reward_funcs=f)", 0.0),
     ("def main():\n    args = GRPOConfig(beta=B)\nB = 0.8\nif __name__ == '__main__':\n    main()", 0.8)],
)  # fmt: skip
def test_where_a_script_sets_an_option(text, beta):
    setup = read(HEAD + text)
    assert setup.kl_coef == beta
    assert not [line for line in setup.unread if "not resolved" in line or "anything" in line]


def test_the_class_of_a_script_has_the_fields_that_python_gives_it():
    for text, why in (
        ("class My(GRPOConfig):\n    beta: float = 0.7\n", "without @dataclass"),
        ("@dataclass\nclass My(GRPOConfig):\n    beta = 0.7\n", "without an annotation"),
    ):
        names: dict[str, object] = {}
        exec("from dataclasses import dataclass\n" + HEAD + text, names)
        setup = read(HEAD + text + "My()")
        assert setup.kl_coef == names["My"]("o", use_cpu=True, bf16=False).beta == 0.0
        assert f"My.beta (line {3 if '@' not in text else 4}) sets nothing: {why} it is no field" in setup.unread


@pytest.mark.parametrize(
    ("text", "line"),
    [("GRPOConfig(beta=args.beta)", "beta=args.beta (line 2) is not resolved"),
     ("def f(b=0.1):\n    GRPOConfig(beta=b)", "beta=b (line 3)"),
     ("GRPOConfig(**options)", "options (line 2) may set anything"),
     ("a = GRPOConfig(beta=0.1)\nif x:\n    a.beta = 0.2\nGRPOTrainer(args=a)", "beta=0.2 (line 4), if it runs,"),
     ("def f(a):\n    a.beta = 1\nx = GRPOConfig(beta=0.1)\nf(x)\nGRPOTrainer(args=x)", "beta=what f sets (line 3)"),
     ("class T:\n    def f(self, a):\n        self.args = a\n        self.args.beta = 1\nGRPOConfig(beta=0.1)",
      "beta=what args.beta is set to (line 5)"),
     ("a = GRPOConfig(beta=0.1)\nb = a\nb.beta = 1", "another name of a (line 3) may"),
     ("GRPOConfig(beta=0.1)\nGRPOConfig(beta=0.2)", "2 configurations of GRPO are in the file (line 2, line 3)"),
     ("exec(open('c').read())\nGRPOConfig(beta=B)", "beta=B (line 3)"), ("GRPOConfig(beta=0.1, **x)", "x (line 2) may set any"),
     ("a = GRPOConfig(beta=0.1)\na.set_training(x)\nGRPOTrainer(args=a)", "a change of a (line 3) may set anything"),
     ("class R:\n    def f(self):\n        self.cfg = GRPOConfig(beta=0.1)\n        self.cfg.beta = 1\n",
      "beta=what cfg.beta is set to (line 5)"),
     ("import copy\na = GRPOConfig(beta=0.1)\nb = copy.deepcopy(a)\nb.beta = 1\nGRPOTrainer(args=b)",
      "beta=what b.beta is set to (line 5)"),
     ("a = GRPOConfig(beta=0.1)\na = other(a)\nGRPOTrainer(args=a)", "other(a) (line 3) may set anything"),
     ("a = GRPOConfig(beta=0.1)\nt = GRPOTrainer(args=a)\nt.beta = 1", "beta=what t.beta is set to (line 4)"),
     ("k = dict(beta=0.1)\ndef f(d):\n    d['beta'] = 1\nf(k)\nGRPOConfig(**k)", "f(k) (line 5) may set anything")],
)  # fmt: skip
def test_what_a_script_leaves_open_is_listed_and_no_rule_judges_by_it(text, line):
    setup = read(HEAD + text)
    assert any(line in unread for unread in setup.unread), setup.unread
    assert setup.kl_coef is None
    found = {f.rule: f for f in examine_setup(setup)}
    assert found["kl"].seen.startswith("not known")


def test_batches_that_are_not_known_are_not_checked():
    setup = read(HEAD + "GRPOConfig(num_generations=16, per_device_train_batch_size=n, num_iterations=2)")
    assert (setup.steps, setup.group, setup.tokens) == (None, 16, 0)
    setup = read(HEAD + "GRPOConfig(num_generations=n, gradient_accumulation_steps=4, num_iterations=2)")
    assert (setup.steps, setup.group) == (2.0, None)
    setup = read("num_generations: 14\nper_device_train_batch_size: 16\nlearning_rate: 1e-6\n", "grpo.yaml")
    assert "processes=7 (TRL refuses fewer with these batches; --processes N)" in setup.assumed
    with pytest.raises(ValueError, match="divisible"):
        read("num_generations: 14\nper_device_train_batch_size: 16\n", "grpo.yaml", processes=2)


def test_after_a_change_the_steps_of_a_created_configuration_are_not_known():
    setup = read(HEAD + "a = GRPOConfig(num_iterations=1)\na.num_iterations = 4\nGRPOTrainer(args=a)")
    assert setup.steps is None
    assert "set after the configuration was created" in " ".join(setup.unread)


def test_bandpo_s_own_configuration_and_a_loss_of_the_file(capsys):
    setup = read("from bandpo.integrations.trl import BandGRPOConfig\nBandGRPOConfig(num_iterations=2)")
    assert setup.ours and setup.objective.name == BandGRPOConfig(use_cpu=True, output_dir="x").resolve().name
    text = HEAD + "class Mine(GRPOTrainer):\n    def _compute_loss(self): ...\nMine(args=GRPOConfig(num_iterations=2))"
    assert read(text).bypassed == "Mine._compute_loss (line 3) takes the place of GRPOTrainer's"
    assert main(["doctor", "train.py"]) == 1
    assert "!! bypass: Mine._compute_loss" in capsys.readouterr().out


def test_the_model_of_a_script():
    load = "import torch\nfrom transformers import AutoModelForCausalLM\nm = AutoModelForCausalLM.from_pretrained('org/m', "
    setup = read(HEAD + load + "torch_dtype=torch.bfloat16)\nGRPOTrainer(model=m, args=GRPOConfig(learning_rate=1e-6))")
    assert (setup.weights, setup.learning_rate) == ("bfloat16", 1e-6)
    assert "the vocabulary of org/m is not known here" in " ".join(setup.unread)
    setup = read(HEAD + load + "torch_dtype=torch.bfloat16)\nGRPOTrainer(model=m, args=GRPOConfig(), peft_config=p)")
    assert setup.weights is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("from trl import RLOOConfig\nRLOOConfig(beta=0.1)", "this looks like TRL's RLOOTrainer"),
     ("from trl.experimental.online_dpo import OnlineDPOConfig\nOnlineDPOConfig()", "TRL's OnlineDPOTrainer"),
     ("from trl import SFTConfig\nSFTConfig()", "TRL's SFTTrainer"), ("print(1)", "there is no call of GRPOConfig in it"),
     (HEAD + "from trl import TrlParser\na, = TrlParser((GRPOConfig,)).parse_args_and_config()\nGRPOTrainer(args=a)",
      "in a YAML file or on its command line"),
     ("def (", "it is not Python: invalid syntax (line 1)"), ("a\0b", "null bytes"), ("-" * 100_000 + "1", "not Python"),
     (HEAD + "GRPOConfig(beta='x')", "beta: 'x' is not a number of a run"), ("GRPOConfig()\n" * 60, "more than 50"),
     (HEAD + "GRPOConfig(num_iterations=0)", "must be at least 1"), ("a\n" * MAX_SOURCE_BYTES, "too large")],
)  # fmt: skip
def test_other_scripts_are_named_and_refused(text, message):
    with pytest.raises(ValueError, match=r"train\.py") as error:
        read(text)
    assert message in str(error.value)


def test_overrides_change_a_script():
    text = HEAD + "GRPOConfig(num_iterations=n, beta=0.1)"
    setup = read(text, "train.py", "num_iterations=3", "beta=0")
    assert (setup.steps, setup.kl_coef) == (3.0, 0.0)


# ---- notebooks and unsloth


def test_a_notebook_is_its_cells():
    text = notebook(
        "%%capture\n!pip install trl \\\n    vllm\nBETA = 0.1",
        "?GRPOConfig\nfiles = !ls", "%%bash\necho x", "%%writefile a.py\nx",
        HEAD + "a = GRPOConfig(beta=BETA, num_iterations=K)",
    )  # fmt: skip
    setup = read(text, "n.ipynb")
    assert setup.kl_coef == 0.1
    assert "num_iterations=K (code cell 5, line 2) is not resolved" in setup.unread
    assert "code cell 4 writes 'a.py', which is not read" in setup.unread
    for between in ("%run setup.py", "def ("):  # either may bind any name
        assert read(notebook("BETA = 0.1", between, HEAD + "GRPOConfig(beta=BETA)"), "n.ipynb").kl_coef is None


@pytest.mark.parametrize(
    ("data", "message"),
    [("{}", "it has no list of cells"), ("[" * 100_000, "is not JSON"),
     (notebook("x", language="julia"), "notebook of 'julia'"),
     (notebook(*["a = 1"] * 2001), "more than 2,000 cells"), ('{"cells": [' + "1," * 1_000_001 + "1]}", "clear its outputs"),
     (" " * ((1 << 24) + 1), "too large"), (notebook("print(1)"), "there is no call of GRPOConfig")],
)  # fmt: skip
def test_other_notebooks_are_refused(data, message):
    with pytest.raises(ValueError, match=r"n\.ipynb") as error:
        read(data, "n.ipynb")
    assert message in str(error.value)


def test_unsloth_has_its_own_defaults_and_its_own_loss():
    load = "from unsloth import FastLanguageModel\nm, t = FastLanguageModel.from_pretrained('m', fast_inference="
    text = (
        load
        + "True)\n"
        + HEAD
        + "GRPOTrainer(model=m, args=GRPOConfig(num_generations=6, use_bias_correction_kl=True))"
    )
    setup = read(notebook(text), "n.ipynb")
    assert (setup.host, setup.ours, setup.bypassed, setup.engine) == ("unsloth", False, "", "vLLM")
    assert (setup.kl_coef, setup.kl, setup.corrected) == (UNSLOTH_DEFAULTS["beta"], "k3", False)
    assert setup.objective.name == "bnpo"
    assert "per_device_train_batch_size=6 (unsloth changes 4, which does not fill a group)" in setup.assumed
    found = {f.rule: f for f in examine_setup(setup)}
    assert "the loss is unsloth's own (bnpo)" in found["bypass"].seen
    assert "unsloth's (015bdef0, 2026-08-22) and then TRL's defaults are assumed" in found["assumed"].seen
    assert read(load + "fast)\n" + HEAD + "GRPOConfig()").engine is None
    dapo = read("import unsloth\n" + HEAD + "GRPOConfig(loss_type='dapo', epsilon_high=0.2)")
    assert dapo.objective.bounds == Clip(0.2, 0.28)
    ours = read("import unsloth\nfrom bandpo.integrations.trl import BandGRPOConfig\nBandGRPOConfig()")
    assert ours.bypassed.startswith("unsloth is loaded")


# ---- launch lines


def test_a_launch_line_of_trl():
    setup = read(
        "trl grpo --model_name_or_path q --beta 0 --num_iterations 2 --use-vllm --epsilon_high=0.28\n", "run.sh"
    )
    assert (setup.host, setup.steps, setup.kl_coef, setup.engine) == ("TRL", 2.0, 0.0, "vLLM")
    assert setup.objective.bounds == Clip(0.2, 0.28)
    text = ("accelerate launch --config_file z.yaml --num_processes=4 src/grpo.py --num_generations 8 --loss_type dr_grpo \\\n"
            "  --per_device_train_batch_size 2 --reward_funcs a b --beta $BETA --temperature \"${T:-0.7}\"\n")  # fmt: skip
    setup = read(text, "run.sh")
    assert (setup.group, setup.temperature, setup.kl_coef, setup.objective.name) == (8, 0.7, None, "dr_grpo")
    assert "beta=$BETA (line 2) is not resolved" in setup.unread
    assert "grpo.py is not read: its own defaults are taken to be TRL's" in setup.unread
    assert not any("processes" in what for what in setup.assumed)  # 4 x 2 fill a group
    assert read(text, "run.sh", "beta=0.5").kl_coef == 0.5


@pytest.mark.parametrize("program", ["accelerate launch -m trl.scripts.grpo", "python -m trl.scripts.grpo", "trl grpo"])
def test_trl_s_own_script_is_read_as_a_module_too(program):
    setup = read(f"{program} --num_generations 8 --num_iterations 2 --learning_rate 1e-6\n", "run.sh")
    assert (setup.host, setup.group, setup.steps) == ("TRL", 8, 2.0)


@pytest.mark.parametrize(
    ("launcher", "steps"),
    [("torchrun --nproc_per_node 8", 2.0), ("torchrun --nnodes 2 --nproc-per-node=8", 1.0),
     ("deepspeed --num_nodes 2 --num_gpus 8", 1.0), ("accelerate launch --num_processes 16", 1.0),
     ("accelerate launch --num_processes $N", None), ("torchrun --nnodes $N --nproc_per_node 8", None),
     ("torchrun --nnodes 1:4 --nproc_per_node 8", None), ("torchrun --nproc_per_node auto", None)],
)  # fmt: skip
def test_processes_of_all_nodes_share_a_generation_batch(launcher, steps):
    options = "--num_generations 16 --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    setup = read(f"{launcher} grpo.py {options} --generation_batch_size 128\n", "run.sh")
    assert setup.steps == steps
    assert steps or any("generation_batch_size=128, shared by processes" in line for line in setup.unread)
    told = read("num_generations: 4\ngeneration_batch_size: 128\nper_device_train_batch_size: 4\n", "grpo.yaml")
    assert "processes=1 (they share generation_batch_size; --processes N)" in told.assumed


def test_what_a_launch_line_names_is_not_opened():
    Path("x.yaml").write_text("beta: 0.5\nnum_generations: 4\n")
    setup = read("accelerate launch grpo.py --config x.yaml --num_iterations 2 --learning_rate 1e-6\n", "run.sh")
    assert (setup.steps, setup.kl_coef, setup.group, setup.assumed) == (None, None, None, ())
    assert "bandpo doctor x.yaml num_iterations=2 learning_rate=1e-6" in " ".join(setup.unread)
    assert not any(f.level == "problem" for f in examine_setup(setup))
    for args in ("${ARGS[@]}", "$EXTRA_ARGS"):
        setup = read(f"source e.sh\ntrl grpo --beta 0 --log_completions {args}\n", "run.sh")
        assert (setup.kl_coef, setup.group) == (0.0, None)
        assert f"{args} (line 2) may set anything" in setup.unread
    several = read("trl grpo --beta 0 --epsilon 0.1\ntrl grpo --beta 0.1 --epsilon 0.1\n", "run.sh")
    assert several.kl_coef is None and several.objective.bounds == Clip(0.1, 0.1)
    assert "2 commands train (lines 1, 2), and differ in beta" in " ".join(several.unread)


@pytest.mark.parametrize(
    "text",
    ["python generate.py --num_generations 4 --model x\n", "accelerate launch train.py --learning_rate 1e-6\n",
     "trl sft --x 1\n",
     "accelerate launch rloo.py --num_generations 4 --learning_rate 1e-6\n", "swift sft --model x\n"],
)  # fmt: skip
def test_other_launch_lines_are_refused(text):
    with pytest.raises(ValueError, match=r"run\.sh"):
        read(text, "run.sh")


# ---- ms-swift


SWIFT = ("NPROC_PER_NODE=8 swift rlhf --rlhf_type grpo --model q --epsilon 3e-4 --epsilon_high 4e-4 --beta 0.0 \\\n"
         "  --importance_sampling_level sequence --steps_per_generation 32 --gradient_accumulation_steps 8 --use_vllm true \\\n"
         "  --num_generations 16 --tuner_type full --torch_dtype bfloat16 --learning_rate 1e-6 --top_k 50\n")  # fmt: skip


def test_ms_swift_is_read():
    setup = read(SWIFT, "swift.sh")
    assert (setup.host, setup.ours, setup.steps, setup.group, setup.engine) == ("ms-swift", False, 4.0, 16, "vLLM")
    assert setup.objective.bounds == Clip(3e-4, 4e-4) and setup.objective.ratio_level == "sequence"
    assert (setup.top_k, setup.kl_coef, setup.corrected, setup.temperature) == (50, 0.0, False, DEFAULTS["temperature"])
    assert (setup.weights, setup.learning_rate) == ("bfloat16", 1e-6)
    found = {f.rule: f for f in examine_setup(setup)}
    assert found["inert"].level == "ok" and found["anchor"].level == "warning" and found["precision"].level == "warning"
    assert found["sampling"].knob == "--top_p 1.0 --top_k -1 --min_p 0"
    assert "ms-swift's (3602360a, 2026-08-22) defaults are assumed: " in found["assumed"].seen
    assert "num_iterations=1" in found["assumed"].seen and "beta" not in found["assumed"].seen
    plain = read("swift rlhf --rlhf_type grpo --model q\n", "swift.sh")
    assert (plain.steps, plain.kl_coef, plain.kl, plain.engine) == (1.0, 0.04, "k3", "")
    assert plain.objective.bounds == Clip(0.2, 0.2)
    assert {f.rule: f for f in examine_setup(plain)}["inert"].level == "problem"


def test_ms_swift_s_files_and_variants():
    yaml = "rlhf_type: grpo\nmicro_batch_size: 2\nglobal_batch_size: 16\nsteps_per_generation: 4\ntrain: {tuner_type: lora}\n"
    setup = read(yaml, "ray.yaml")
    assert (setup.steps, setup.engine) == (4, "vLLM")
    assert read(json.dumps({"rlhf_type": "grpo", "num_iterations": 3, "beta": None}), "args.json").steps == 3.0
    assert read(yaml, "ray.yaml", "steps_per_generation=2").steps == 2
    rloo = read_swift({"rlhf_type": "grpo", "advantage_estimator": "rloo"})
    assert (rloo.kl_coef, rloo.kl_from) == (0.0, "kl_in_reward")
    assert read_swift({"rlhf_type": "grpo", "num_generations": 1, "teacher_model": "t"}).alone is None
    assert read_swift({"rlhf_type": "grpo", "num_generations": 1}).alone[0] == "problem"
    assert read_swift({"rlhf_type": "grpo", "async_generate": "true"}).steps is None
    assert read_swift({"rlhf_type": "grpo", "generation_batch_size": "64"}).steps is None
    assert read_swift({"rlhf_type": "grpo", "loss_type": "fipo"}).objective is None
    assert (
        read_swift({"rlhf_type": "grpo", "num_iteration": "2"}).steps is None
    )  # it may have been meant for what decides
    assert read_swift({"rlhf_type": "grpo"}, unknown={"epsilon": "$E"}).objective is None
    assert read_swift({"rlhf_type": "grpo"}, opened=["$ARGS"]).temperature is None


@pytest.mark.parametrize(
    ("given", "message"),
    [({"rlhf_type": "dpo"}, "rlhf_type='dpo'"), ({"rlhf_type": "grpo", "beta": "x"}, "beta: 'x' is not a number"),
     ({"rlhf_type": "grpo", "num_iterations": 0}, "whole number of at least 1"), ({"config": "a.yaml"}, "examine a.yaml"),
     ({"rlhf_type": "grpo", "use_vllm": "maybe"}, "neither true nor false"), ({"rlhf_type": "grpo", "loss_type": [1]}, "name"),
     ({"rlhf_type": "grpo", "temperature": "nan"}, "is not a number of a run")],
)  # fmt: skip
def test_other_options_of_ms_swift_are_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_swift(given)


# ---- objects, defaults and safety


def test_objects_are_read_as_their_files():
    options = {"num_generations": 4, "num_iterations": 2, "beta": 0.1, "top_k": 20, "per_device_train_batch_size": 8}
    for cls, more in ((GRPOConfig, {}), (BandGRPOConfig, {"objective": "bandpo-kl", "radius": 0.03})):
        found = setup_of(cls(output_dir="x", use_cpu=True, bf16=False, **options, **more))
        read_again = read_trl({**options, **more})
        for name in (
            "steps",
            "group",
            "kl_coef",
            "kl",
            "top_k",
            "objective",
            "engine",
            "ours",
            "tokens",
            "temperature",
        ):
            assert getattr(found, name) == getattr(read_again, name), name
        assert found.assumed == ()
    kwargs = GRPOConfig(output_dir="x", use_cpu=True, bf16=False, generation_kwargs={"top_p": 0.5})
    assert setup_of(kwargs).top_p == 0.5
    with pytest.raises(TypeError, match="got dict"):
        setup_of({})


def test_assumed_defaults_are_those_of_the_installed_trl():
    default = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    setup = read("num_iterations: 1\nreward_funcs: [a]\n", "grpo.yaml")
    shown = dict(text.split("=", 1) for text in setup.assumed)
    assert {name: str(default[name]) for name in shown} == shown
    assert setup.defaults_of.startswith("TRL ")
    assert all(default[name] != value for name, (_, value) in CHANGED_DEFAULTS.items())
    old = read("num_generations: 8\nmax_prompt_length: 512\nbeta: 0.1\n", "grpo.yaml")
    line = next(line for line in old.unread if "the defaults of older ones may hold" in line)
    assert "loss_type=bnpo (before 0.22)" in line and "beta=" not in line
    assert not any("older" in line for line in setup.unread)


def test_nothing_of_a_program_runs(capsys):
    evil = "import pathlib\npathlib.Path('ran').write_text('x')\n" + HEAD
    evil += "class C(GRPOConfig):\n    beta = pathlib.Path('ran').write_text('x')\n"
    evil += "GRPOConfig(beta=0.1, num_iterations=__import__('os').system('touch ran'), **eval(\"open('ran', 'w')\"))\n"
    Path("helper.py").write_text("import pathlib; pathlib.Path('ran').write_text('x')")
    for name, text in (
        ("train.py", "import helper\n" + evil), ("n.ipynb", notebook("!touch ran", "%run helper.py", evil)),
        ("run.sh", "python helper.py\ntrl grpo --beta $(touch ran) --epsilon `touch ran`\n"),
    ):  # fmt: skip
        Path(name).write_text(text)
        main(["doctor", name])
        assert not Path("ran").exists()
    torch.save({"beta": 0.1}, "training_args.bin")
    assert main(["doctor", "training_args.bin"]) == 2
    assert "is a pickle, which could run code" in capsys.readouterr().err


def test_characters_and_secrets_of_a_program_are_not_printed(capsys):
    Path("train.py").write_text(
        HEAD + "GRPOConfig(beta=f('\\x1b[31m\x1b[31m', token='hf_abcdefghijklmnopqrstuvwxyz012345'))\n"
    )
    main(["doctor", "train.py"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "hf_abcdefghij" not in out


N = MAX_SOURCE_BYTES - 100
HOSTILE = {
    "bindings": "a = 1\n" * (N // 6 - 10) + "GRPOConfig(beta=a)",
    "names": "a=" * (N // 2 - 20) + "GRPOConfig()",
    "changes": "d = {}\n" + "d['a'] = 1\n" * (N // 11 - 10) + "GRPOConfig(**d)",
    "calls": "x = GRPOConfig()\ndef f(a):\n    a.b = 1\n" + "f(x)\n" * (N // 5 - 20),
    "keys": "GRPOConfig(**{" + ", ".join(f"a{i}: b" for i in range(N // 12)) + "})",
    "keywords": "GRPOConfig(**dict(" + ", ".join(f"a{i}=b" for i in range(N // 12)) + "))",
    "chain": "a0 = 1\n" + "".join(f"a{i} = a{i - 1}\n" for i in range(1, N // 16)) + "GRPOConfig(beta=a9999)",
    "doubling": "a0 = [1, 1]\n" + "".join(f"a{i} = [a{i - 1}, a{i - 1}]\n" for i in range(1, 39)) + "GRPOConfig(beta=a38)",
    "bases": "".join(f"class C{i}({', '.join(f'C{j}' for j in range(40))}): pass\nC{i}()\n" for i in range(40)),
    "dots": "a" + ".b" * (N // 2), "list": "x = [" + "1," * (N // 2 - 10) + "]", "unary": "-" * N + "1",
    "plus": "1" + "+1" * (N // 2),
    "same name": "a = GRPOConfig()\n" + "if x: a = a\n" * 200 + "GRPOTrainer(args=a)",
    "passed on": "a = GRPOConfig()\n" + "if x: a = f(a, a, a)\n" * 200 + "GRPOTrainer(args=a)",
    "calls of calls": "a" + "()" * (N // 2), "elif": "if a: pass\n" + "elif a: pass\n" * (N // 14), "brackets": "(" * N,
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_time_is_bounded(kind):
    """Most of it is Python's own parser."""
    began = time.process_time()
    with contextlib.suppress(ValueError):
        read(HOSTILE[kind])
    assert time.process_time() - began < 4.0
