"""Configuration of `bandpo train`: YAML and command line over two dataclasses, ours and TRL's."""

import difflib
import importlib.resources
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from trl import TrlParser

from bandpo._system.files import read_yaml
from bandpo._system.secrets import HIDDEN, redact_text, remember
from bandpo.integrations.trl import BandGRPOConfig
from bandpo.integrations.trl.online import OnlinePreferenceConfig
from bandpo.toy.tasks import TASKS

METHODS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dpo": {"objective": "dpo", "resample": False},
    "chipo": {"objective": "chipo", "resample": False},
    "online-dpo": {"objective": "dpo"},
    "pdfr": {"objective": "pdfr"},
    "rebel": {"objective": "rebel"},
    "rdrc": {"objective": "rdrc"},
    "rbrm": {"objective": "rbrm", "labels": "probe", "resample": False},
}
"""What `bandpo train --method` stands for: grpo is policy gradient with the zoo's objectives, the others learn preferences."""

TrainerConfig = BandGRPOConfig | OnlinePreferenceConfig


@dataclass
class RunConfig:
    """What to train on what. The options of TRL's GRPOConfig, or of its DPOConfig, stand beside these."""

    method: str = field(default="grpo", metadata={"help": f"One of {', '.join(METHODS)}."})
    model: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of a causal LM. Default: a small model, warmed up on the task."},
    )
    task: str | None = field(default=None, metadata={"help": f"Built-in task: {', '.join(TASKS)}."})
    dataset: str | None = field(default=None, metadata={"help": "Hub name, or a .jsonl, .json, .parquet or .csv file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "As dataset. Default: prompts held out from dataset."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of a Hub eval_dataset."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompt, text or messages."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the reference answer."})
    system_prompt: str | None = field(default=None, metadata={"help": "Put before text prompts."})
    reward: str | None = field(
        default=None, metadata={"help": "'math', a task's name, or 'package.module:NAME'. Default: the task's."}
    )
    reward_timeout: float = field(
        default=600.0, metadata={"help": "Seconds after which one call of the reward function counts as hung."}
    )
    reward_errors: str = field(
        default="stop",
        metadata={
            "help": "A reward call that raises or hangs ends the run (stop), or leaves its samples unscored (skip)."
        },
    )
    bad_rows: str = field(
        default="error",
        metadata={
            "help": "Rows without prompt or answer, with an answer that reward math cannot read, or too long for the model: "
            "error, or skip (counted)."
        },
    )
    pairs: str | None = field(
        default=None,
        metadata={"help": "For dpo and chipo: a dataset with columns chosen and rejected, in place of sampled pairs."},
    )
    eval_prompts: int = field(
        default=256, metadata={"help": "Held-out prompts; their batches follow per_device_eval_batch_size."}
    )
    eval_samples: int = field(default=8, metadata={"help": "Samples of each held-out prompt, k of mean@k."})
    eval_temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature of the evaluation. Default: that of training."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Train LoRA adapters of this rank; 0 trains all weights."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale."})
    warm_up_steps: int = field(default=250, metadata={"help": "Supervised steps of the built-in small model."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: torch's."})
    dry_run: bool = field(default=False, metadata={"help": "Print the configuration and stop."})

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.pairs is not None and self.method not in ("dpo", "chipo"):
            raise ValueError(f"pairs={self.pairs!r}: method {self.method!r} samples its own; use dpo or chipo")
        if self.method != "grpo" and self.lora_rank and self.pairs is None:
            raise ValueError(
                f"lora_rank={self.lora_rank}: method {self.method!r} trains all weights unless pairs are given"
            )
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"task: got {self.task!r}; choose one of {', '.join(TASKS)}")
        if self.task is not None and self.dataset is not None:
            raise ValueError(f"task={self.task!r} and dataset={self.dataset!r} are both set; choose one")
        if self.task is None and self.dataset is None:
            raise ValueError(f"nothing to train on: set dataset, or task to one of {', '.join(TASKS)}")
        if self.task is None and self.model is None:
            raise ValueError("dataset needs model: the built-in small model only knows the built-in tasks")
        if self.task is None and self.reward is None:
            raise ValueError("dataset needs reward: 'math' or 'package.module:NAME'")
        for name in ("eval_prompts", "eval_samples", "warm_up_steps", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, allowed in (("reward_errors", ("stop", "skip")), ("bad_rows", ("error", "skip"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if not 0 < self.reward_timeout < math.inf:
            raise ValueError(f"reward_timeout must be a positive number of seconds, got {self.reward_timeout}")
        if self.eval_temperature is not None and not 0 <= self.eval_temperature < math.inf:
            raise ValueError(f"eval_temperature must be 0 (greedy) or a positive number, got {self.eval_temperature}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be >= 0, got {self.lora_rank}")


class _Parser(TrlParser):
    """Its errors repeat what was typed."""

    def error(self, message: str) -> NoReturn:
        super().error(redact_text(message))


def parse(arguments: list[str]) -> tuple[RunConfig, TrainerConfig, dict[str, Any]]:
    """Our config, TRL's, and the settings as they were given (which repeat the run).

    The file of `--config` (without it and without `--model`, the method's default job) is read first, the command line wins.

    Raises:
        ValueError: If a key or option is unknown; the message names the nearest one.
    """
    arguments = list(arguments)
    given = _read_yaml(arguments)
    method = str(_option(arguments, "--method") or given.get("method", "grpo"))
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; choose one of {', '.join(METHODS)}")
    cls = BandGRPOConfig if method == "grpo" else OnlinePreferenceConfig
    _as_floats(given, cls)
    parser = _Parser(
        (RunConfig, cls),
        prog="bandpo train",
        usage="bandpo train [--method METHOD] [--config FILE.yaml] [--OPTION VALUE ...]",
        description="Without --config, --model and --dataset: the main job, a small model on the CPU. Every option is also a "
        "key of the YAML file, and the command line wins. The first options are bandpo's; the others are those of TRL's "
        "GRPOConfig, or with a preference method (--method dpo --help) of its DPOConfig.",
        allow_abbrev=False,
    )
    known = {action.dest for action in parser._actions} - {"help"}
    for key in given:
        _check_known(key, known, "key")
    options = [a.split("=")[0] for a in arguments if a.startswith("--")]
    for option in options:
        if option not in parser._option_string_actions:
            _check_known(option.lstrip("-").replace("-", "_"), known, "option")
    chosen = {parser._option_string_actions[o].dest for o in options}
    implied = METHODS[method]
    for name in implied:
        if name in chosen or name in given:
            raise ValueError(f"{name} is what method {method!r} stands for ({name}={implied[name]}); leave it out")
    remember(given)
    for key in given:
        if key not in chosen and HIDDEN in str(given[key]):
            raise ValueError(
                f"{key}: the file has {HIDDEN} in it, since a run writes no secrets; give it: --{key} VALUE"
            )
    parser.set_defaults_with_config(**given, **implied)
    run, trainer = parser.parse_args_into_dataclasses(arguments)
    values = vars(parser.parse_args(arguments))
    return run, trainer, {**given, **{name: values[name] for name in sorted(chosen)}}


def run_keys() -> frozenset[str]:
    """The keys of a `bandpo train` file that are ours and not TRL's."""
    return frozenset(f.name for f in fields(RunConfig))


def check_run(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a `bandpo train` file for a policy-gradient method, our part of them checked.

    Raises:
        ValueError: If a value is refused, or the method learns preferences.
    """
    given = dict(given)
    _as_floats(given, BandGRPOConfig)
    run = RunConfig(**{k: v for k, v in given.items() if k in run_keys()})
    if run.method != "grpo":
        raise ValueError(f"method={run.method!r} has no trust region on ratios; the doctor examines method=grpo")
    return given


def _option(arguments: list[str], name: str) -> str | None:
    """The value of an option on the command line, before the parser for it is known."""
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def _read_yaml(arguments: list[str]) -> dict[str, Any]:
    """Take `--config FILE` out of the arguments and read it; the main job's file stands in for none."""
    for i, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            if argument == "--config" and i + 1 == len(arguments):
                raise ValueError("--config needs a file")
            path = Path(arguments[i + 1] if argument == "--config" else argument.partition("=")[2])
            del arguments[i : i + (2 if argument == "--config" else 1)]
            break
    else:
        if any(a.split("=")[0] in ("--model", "--dataset", "--help", "-h") for a in arguments):
            return {}
        method = METHODS.get(_option(arguments, "--method") or "grpo", {})
        job = (
            "main_job" if not method else "preference_job" if method.get("resample", True) else "offline_preference_job"
        )
        path = Path(str(importlib.resources.files("bandpo.configs") / f"{job}.yaml"))
    try:
        return read_yaml(path)
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from error


def _as_floats(given: dict[str, Any], cls: type) -> None:
    """YAML reads 1e-6, without a dot, as text."""
    floats = {f.name for c in (RunConfig, cls) for f in fields(c) if "float" in str(f.type)}
    for key, value in given.items():
        if key in floats and isinstance(value, str):
            try:
                given[key] = float(value)
            except ValueError:
                raise ValueError(f"{key}: {value!r} is not a number") from None


def _check_known(name: str, known: set[str], what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {what} {name!r}{hint} (all of them: bandpo train --help)")
