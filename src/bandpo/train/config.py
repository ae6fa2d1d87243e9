"""Configuration of `bandpo train`: YAML and command line over two dataclasses, ours and TRL's.

TRL is imported when its dataclass is needed: what a file and a command line name is read and checked without it.
"""

import argparse
import importlib.resources
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias, cast

from bandpo._system.files import read_yaml
from bandpo._system.options import did_you_mean, not_one_of
from bandpo._system.secrets import HIDDEN, redact_text, remember
from bandpo.toy.tasks import TASKS

if TYPE_CHECKING:
    from bandpo.integrations.trl import BandGRPOConfig
    from bandpo.integrations.trl.online import OnlinePreferenceConfig
    from bandpo.train.compute import Compute, Machine

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
"""The methods of `bandpo train`, with the options that each implies: grpo is policy gradient, the others learn preferences."""

TrainerConfig: TypeAlias = "BandGRPOConfig | OnlinePreferenceConfig"

DEFAULT_LENGTH = 1024
"""Number of tokens of the longest completion where nothing else says it."""

MATH = frozenset({"math", "math-lenient"})
"""The rewards that compare answers with math-verify."""

MAX_SHOTS = 64
"""Largest number of solved examples before a question."""

CHOICES = {"reward_errors": ("stop", "skip"), "bad_rows": ("error", "skip")}
"""The values of the options that have few."""

PRESETS = {"smollm2": "smollm2.yaml"}
"""The files of `--preset`, in `bandpo.configs`."""

USAGE = "bandpo train [--method METHOD] [--config FILE.yaml | --preset NAME] [--OPTION VALUE ...]"

_PACKAGE_OF = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}
"""The package of an integration that has another name."""


class MistakesError(ValueError):
    """One or several mistakes in a configuration, which are all named.

    Args:
        mistakes: A message for each.

    Examples:
        >>> str(MistakesError(["lora_rank must be >= 0, got -1"]))
        'lora_rank must be >= 0, got -1'
    """

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = tuple(mistakes)
        """The messages."""
        several = "\n".join([f"{len(mistakes)} mistakes", *(f"  {i}. {one}" for i, one in enumerate(mistakes, 1))])
        super().__init__(mistakes[0] if len(mistakes) == 1 else several)


@dataclass
class RunConfig:
    """bandpo's options of `bandpo train`: model, data, reward, evaluation. TRL's config holds the other options.

    Raises:
        MistakesError: If options have no allowed value, or contradict each other; a ValueError that names all of them.
    """

    method: str = field(default="grpo", metadata={"help": f"One of {', '.join(METHODS)}."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or folder of a causal LM, a GGUF file, or wheel:smollm2. Default: a small model, warmed up on "
            "the task."
        },
    )
    task: str | None = field(default=None, metadata={"help": f"Built-in task: {', '.join(TASKS)}."})
    shots: int | None = field(
        default=None,
        metadata={
            "help": "Give a task as a chat, with so many solved examples before each question. Default: the compact text that "
            "the built-in small model knows."
        },
    )
    dataset: str | None = field(default=None, metadata={"help": "Hub name, or a .jsonl, .json, .parquet or .csv file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Dataset of the evaluation, as for dataset. Default: prompts held out from dataset."},
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of a Hub eval_dataset."})
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column with the prompt, text or messages; COLUMN.PART for a part of a column."},
    )
    answer_column: str = field(
        default="answer", metadata={"help": "Column with the reference answer, such as reward_model.ground_truth."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System prompt of text prompts."})
    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "'math', 'math-lenient', a task's name, or 'package.module:NAME'. Several are added with the weights of "
            "reward_weights, and the first of them scores the evaluation. Default: the task's."
        },
    )
    reward_timeout: float = field(
        default=600.0, metadata={"help": "Seconds after which one call of the reward function counts as hung."}
    )
    reward_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes of the math rewards on each process of the run. Default: its share of the CPUs, at most "
            "16."
        },
    )
    reward_errors: str = field(
        default="stop",
        metadata={
            "help": "What to do when a call of the reward raises or hangs: end the run (stop), or leave its samples "
            "unscored (skip)."
        },
    )
    bad_rows: str = field(
        default="error",
        metadata={
            "help": "What to do with rows without prompt or answer, with an answer that reward math cannot read, or that are "
            "too long for the model: end with an error (error), or leave them out and count them (skip)."
        },
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "For dpo and chipo: a dataset with the columns chosen and rejected, used instead of sampled pairs."
        },
    )
    eval_prompts: int = field(
        default=256,
        metadata={"help": "Held-out prompts; the batch size of the evaluation is per_device_eval_batch_size."},
    )
    eval_samples: int = field(default=8, metadata={"help": "Samples of each held-out prompt, the k of mean@k."})
    eval_temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature of the evaluation. Default: that of training."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Train LoRA adapters of this rank; 0 trains all weights."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the LoRA adapters."})
    warm_up_steps: int = field(default=250, metadata={"help": "Supervised training steps of the built-in small model."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: chosen by torch."})
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Check what the start of a run would find (configuration, model, data, rewards, memory), print it with the "
            "configuration, and stop."
        },
    )

    def __post_init__(self) -> None:
        mistakes = [*self._of_method(), *self._of_rewards()]
        mistakes += [*self._of_data(), *self._of_numbers()]  # which use the list of rewards
        if mistakes:
            raise MistakesError(mistakes)

    def _of_method(self) -> Generator[str]:
        if self.method not in METHODS:
            yield not_one_of("method", self.method, METHODS)
            return
        if self.pairs is not None and self.method not in ("dpo", "chipo"):
            yield f"pairs={self.pairs!r}: method {self.method!r} samples its own; use dpo or chipo"
        if self.method != "grpo" and self.lora_rank and self.pairs is None:
            yield f"lora_rank={self.lora_rank}: method {self.method!r} trains all weights unless pairs are given"

    def _of_data(self) -> Generator[str]:
        if self.task is not None and self.task not in TASKS:
            yield not_one_of("task", self.task, TASKS)
        if self.task is not None and self.dataset is not None:
            yield f"task={self.task!r} and dataset={self.dataset!r} are both set; choose one"
        if self.task is None and self.dataset is None:
            yield f"nothing to train on: set dataset, or task to one of {', '.join(TASKS)}"
        if self.task is None and self.model is None and self.dataset is not None:
            yield "dataset needs model: the built-in small model only knows the built-in tasks"
        if self.task is None and self.reward is None and self.dataset is not None:
            yield "dataset needs reward: 'math', 'math-lenient' or 'package.module:NAME'"
        if self.shots is not None and (self.task is None or self.model is None):
            yield (
                f"shots={self.shots} needs task and model: the prompts of a dataset are used as they are, and the built-in "
                "small model knows no chat"
            )
        if self.shots is not None and not 0 <= self.shots <= MAX_SHOTS:
            yield f"shots must be in [0, {MAX_SHOTS}], got {self.shots}"

    def _of_numbers(self) -> Generator[str]:
        for name in ("eval_prompts", "eval_samples", "warm_up_steps", "threads", "reward_workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"{name} must be at least 1, got {getattr(self, name)}"
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                yield not_one_of(name, getattr(self, name), allowed)
        if self.reward_workers is not None and MATH.isdisjoint(self.rewards):
            yield (
                f"reward_workers={self.reward_workers} would be ignored: only {' and '.join(sorted(MATH))} have processes of "
                "their own"
            )
        if not 0 < self.reward_timeout < math.inf:
            yield f"reward_timeout must be a positive number of seconds, got {self.reward_timeout}"
        if self.eval_temperature is not None and not 0 <= self.eval_temperature < math.inf:
            yield f"eval_temperature must be 0 (greedy) or a positive number, got {self.eval_temperature}"
        if self.lora_rank < 0:
            yield f"lora_rank must be >= 0, got {self.lora_rank}"

    def _of_rewards(self) -> Generator[str]:
        """Check the names of the rewards; a single name, as in `reward: math`, becomes a list of one."""
        if self.reward is None:
            return
        names: object = [self.reward] if isinstance(self.reward, str) else self.reward
        if (
            not isinstance(names, list)
            or not names
            or not all(isinstance(n, str) and n for n in cast("list[Any]", names))
        ):
            yield f"reward: got {self.reward!r}; give a name, or a list of names"
            self.reward = []  # so that the other checks find no names
            return
        self.reward = cast("list[str]", names)
        if len(set(self.reward)) < len(self.reward):
            yield f"reward: {', '.join(self.reward)} has a name twice; give it once, with a larger weight"
        if self.method != "grpo" and len(self.reward) > 1:
            yield (
                f"reward: method {self.method!r} labels its samples with one reward, got {', '.join(self.reward)}; write one "
                "function that adds them"
            )

    @property
    def rewards(self) -> list[str]:
        """The names of the rewards; the first one scores the evaluation."""
        return self.reward or ([] if self.task is None else [self.task])


class Declared(NamedTuple):
    """The options of a method: those of TRL's classes, or of a table that was made from them."""

    parser: argparse.ArgumentParser
    floats: frozenset[str]
    """Names of the options that are numbers with a fraction, which YAML reads as text where they have no dot (1e-6)."""


class Request(NamedTuple):
    """What a file and a command line ask for, with known names only; the values are not checked yet."""

    method: str
    declared: Declared
    given: dict[str, Any]
    """The keys and values of the file."""
    arguments: list[str]
    """The command line without `--config FILE` and `--preset NAME`."""
    chosen: set[str]
    """The names of the options on the command line."""

    def set_defaults(self) -> None:
        """Give the parser the values of the file, and what the method implies, as defaults."""
        given = {**self.given, **METHODS[self.method]}
        for action in self.declared.parser._actions:
            if action.dest in given:
                action.default, action.required = given[action.dest], False


def read(arguments: Iterable[str], declare: Callable[[str], Declared]) -> Request:
    """Read the file of `--config` and the names on the command line, and refuse unknown names.

    Without `--config`, `--preset`, `--model` and `--dataset` the file is the default job of the method.

    Args:
        arguments: Command line after `bandpo train`.
        declare: Gives the options of a method.

    Returns:
        The request, whose values are not checked yet.

    Raises:
        ValueError: If the file cannot be read, or a key or option is unknown; the message names the nearest one.
    """
    arguments = list(arguments)
    given = _read_yaml(arguments)
    method = str(_option(arguments, "--method") or given.get("method", "grpo"))
    if method not in METHODS:
        raise ValueError(not_one_of("method", method, METHODS))
    declared = declare(method)
    mistakes = _as_floats(given, declared.floats)
    chosen = _checked_names(declared.parser, given, arguments, mistakes)
    _refuse_implied(method, {*chosen, *given})
    remember(given)
    _refuse_hidden({key: value for key, value in given.items() if key not in chosen})
    return Request(method, declared, given, arguments, chosen)


class Parsed(NamedTuple):
    """What a file and a command line ask for, checked and completed."""

    run: RunConfig
    args: TrainerConfig
    given: dict[str, Any]
    """The settings as they were given, which repeat the run."""
    compute: "Compute"
    """Device and precision, which the machine decided about where the user had not."""


def parse(arguments: list[str], machine: "Machine | None" = None) -> Parsed:
    """Read the options of `bandpo train` from the file of `--config` and from the command line, which takes precedence.

    Args:
        arguments: Command line after `bandpo train`.
        machine: The machine that device and precision are chosen for. Default: this one.

    Returns:
        bandpo's part of the configuration, TRL's part, the settings as they were given, and device and precision.

    Raises:
        ValueError: If a key or option is unknown; the message names the nearest one. If the machine cannot do what is asked.
    """
    request = read(arguments, declared_by_trl)
    request.set_defaults()
    parser = cast("Any", request.declared.parser)
    values = cast("dict[str, Any]", vars(parser.parse_args(request.arguments)))
    named = {*request.chosen, *request.given}
    compute = _compute(RunConfig(**{name: values[name] for name in run_keys()}), values, named, machine)
    for action in parser._actions:
        if action.dest in compute.options:
            action.default = compute.options[action.dest]
    # On the command line as well: a dry run without a GPU does not check what was asked for.
    again = [
        text for name, value in compute.options.items() if name in request.chosen for text in (f"--{name}", str(value))
    ]
    run, trainer = parser.parse_args_into_dataclasses([*request.arguments, *again])
    _check_weights(run, trainer)
    given = {**request.given, **{name: values[name] for name in sorted(request.chosen)}}
    return Parsed(run, trainer, given, compute)


def _check_weights(run: RunConfig, args: TrainerConfig) -> None:
    weights = cast("list[float] | None", getattr(args, "reward_weights", None))
    if weights is not None and len(weights) != len(run.rewards):
        raise ValueError(
            f"reward_weights: got {len(weights)} ({', '.join(f'{w:g}' for w in weights)}) for {len(run.rewards)} rewards "
            f"({', '.join(run.rewards)}); give one for each"
        )


def _compute(run: RunConfig, values: dict[str, Any], named: set[str], machine: "Machine | None") -> "Compute":
    """Device and precision of a run."""
    from bandpo.train.compute import choose, count_parameters, this_machine, without_gpu

    def size() -> int | None:
        # The built-in model has a fifth of a million.
        return 0 if run.model is None else count_parameters(run.model, local=run.dry_run)

    asked = {name: values[name] for name in ("use_cpu", "bf16", "fp16") if name in named}
    machine = this_machine() if machine is None else machine
    if run.dry_run and (found := without_gpu(asked, machine)) is not None:
        return found
    return choose(asked, size, machine)


def declared_by_trl(method: str) -> Declared:
    """The options of a method as TRL's parser makes them from the dataclasses. Imports TRL.

    Args:
        method: A key of `METHODS`.
    """
    cls = _class_of(method)  # which tells how to install TRL where it is missing
    from trl.scripts.utils import TrlParser

    class Parser(TrlParser):
        """A parser whose errors, which repeat what was typed or what a file has, are those of a value and show no secrets."""

        def error(self, message: str) -> NoReturn:
            raise ValueError(redact_text(message))

    parser = Parser(cast("Any", (RunConfig, cls)), prog="bandpo train", usage=USAGE, allow_abbrev=False)
    return Declared(parser, _floats(cls))


def _class_of(method: str) -> type[TrainerConfig]:
    if method == "grpo":
        from bandpo.integrations.trl import BandGRPOConfig

        return BandGRPOConfig
    from bandpo.integrations.trl.online import OnlinePreferenceConfig

    return OnlinePreferenceConfig


def _floats(cls: type[TrainerConfig]) -> frozenset[str]:
    return frozenset(f.name for c in (RunConfig, cls) for f in fields(c) if "float" in str(f.type))


def _checked_names(
    parser: argparse.ArgumentParser, given: dict[str, Any], arguments: list[str], mistakes: Sequence[str]
) -> set[str]:
    """The names of the options on the command line; an unknown option or key of the file is one more mistake."""
    known = {action.dest for action in parser._actions} - {"help"}
    options = [a.split("=")[0] for a in arguments if a.startswith("--")]
    named = [option for option in options if option not in parser._option_string_actions]
    mistakes = [*_unknown(given, known, "key"), *mistakes]
    mistakes += _unknown((option.lstrip("-").replace("-", "_") for option in named), known, "option")
    if mistakes:
        raise MistakesError(mistakes)
    return {parser._option_string_actions[o].dest for o in options}


def _refuse_implied(method: str, names: set[str]) -> None:
    for name, value in METHODS[method].items():
        if name in names:
            raise ValueError(f"{name}: method {method!r} means {name}={value}; leave it out")


def _refuse_hidden(given: dict[str, Any]) -> None:
    """A file that a run wrote has no secrets: they must be given again."""
    for key, value in given.items():
        if HIDDEN in str(value):
            raise ValueError(
                f"{key}: the file has {HIDDEN} in it, since a run writes no secrets; give it: --{key} VALUE"
            )


def check_reporters(args: TrainerConfig) -> None:
    """Check that the packages that `report_to` names are installed.

    Args:
        args: TRL's part of the configuration.

    Raises:
        ValueError: If one is not, or `report_to` has an unknown name.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    names = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    for name in names:
        if name in (None, "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: got {name!r}; choose from none, {', '.join(INTEGRATION_TO_CALLBACK)}")
        try:
            INTEGRATION_TO_CALLBACK[name]()  # transformers checks for the package here, and a run would do so too late
        except (RuntimeError, ImportError) as error:
            package = _PACKAGE_OF.get(name, name)
            raise ValueError(
                f"report_to={name} needs a package: pip install {package}, or set report_to: none ({error})"
            ) from error


def run_keys() -> frozenset[str]:
    """The keys of a `bandpo train` file that are bandpo's and not TRL's."""
    return frozenset(f.name for f in fields(RunConfig))


def check_run(given: dict[str, Any]) -> dict[str, Any]:
    """Check bandpo's part of the settings in a `bandpo train` file of a policy-gradient method.

    Args:
        given: Keys and values of the file.

    Returns:
        All settings, with numbers that YAML reads as text converted.

    Raises:
        MistakesError: If values are text where a number is needed; a ValueError that names all of them.
        ValueError: If a value is refused, or the method learns preferences.
    """
    given = dict(given)
    if mistakes := _as_floats(given, _floats(_class_of("grpo"))):
        raise MistakesError(mistakes)
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
    """Remove `--config FILE` or `--preset NAME` from the arguments and read the file; without, that of the default job."""
    path = _take_file(arguments)
    if path is None:
        if any(
            a.split("=")[0] in ("--model", "--dataset", "--help", "--help-all", "--schema", "-h") for a in arguments
        ):
            return {}
        path = _default_job(_option(arguments, "--method") or "grpo")
    try:
        return read_yaml(path)
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from error


def _take_file(arguments: list[str]) -> Path | None:
    """Remove `--config FILE` or `--preset NAME` from the arguments; the file that it names, None where there is neither."""
    config, preset = (_take(arguments, option) for option in ("--config", "--preset"))
    if config is not None and preset is not None:
        raise ValueError(f"--config {config} and --preset {preset} are both given; choose one")
    if preset is None:
        return None if config is None else Path(config)
    if preset not in PRESETS:
        raise ValueError(not_one_of("--preset", preset, PRESETS))
    return _packaged(PRESETS[preset])


def _take(arguments: list[str], option: str) -> str | None:
    """Remove an option and its value from the arguments; its value, None where it is not given."""
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 == len(arguments):
            raise ValueError(f"{option} needs {'a file' if option == '--config' else 'a name'}")
        if argument == option:
            value = arguments[i + 1]
            del arguments[i : i + 2]
            return value
        if argument.startswith(f"{option}="):
            del arguments[i]
            return argument.partition("=")[2]
    return None


def _default_job(method: str) -> Path:
    implied = METHODS.get(method, {})
    if not implied:
        name = "main_job"
    else:
        name = "preference_job" if implied.get("resample", True) else "offline_preference_job"
    return _packaged(f"{name}.yaml")


def _packaged(name: str) -> Path:
    return Path(str(importlib.resources.files("bandpo.configs") / name))


def _as_floats(given: dict[str, Any], floats: frozenset[str]) -> list[str]:
    """Convert numbers such as 1e-6, which YAML reads as text because they have no dot; a message for each other text."""
    mistakes: list[str] = []
    for key, value in given.items():
        if key in floats and isinstance(value, str):
            try:
                given[key] = float(value)
            except ValueError:
                mistakes.append(f"{key}: {value!r} is not a number")
    return mistakes


def _unknown(names: Iterable[str], known: set[str], what: str) -> Generator[str]:
    """A message for each name that is not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            yield f"unknown {what} {name!r}{did_you_mean(str(name), known)} (all of them: bandpo train --help-all)"
