"""`bandpo train --dry_run`: everything that the start of a run would find, without training, a download or a folder."""

import dataclasses
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import datasets
import huggingface_hub.constants
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from bandpo._system.errors import RunError, exits_are_errors, place_of, printable, what_happened
from bandpo._system.progress import quiet_hosts
from bandpo._system.secrets import redact, redact_text
from bandpo.doctor.entry import examine
from bandpo.integrations.trl.refusals import refuse_sampler
from bandpo.integrations.trl.strategy import strategy_for
from bandpo.monitoring.findings import Finding, Level
from bandpo.testing import check_bounds, check_surrogate
from bandpo.toy.models import WarmUp, build_model, build_tokenizer
from bandpo.train import memory
from bandpo.train.check_reward import checked_answers, told_answers
from bandpo.train.compute import Machine, millions, this_machine
from bandpo.train.config import (
    DEFAULT_LENGTH,
    MistakesError,
    Parsed,
    RunConfig,
    TrainerConfig,
    check_reporters,
    declared_by_trl,
    parse,
    read,
    run_keys,
)
from bandpo.train.data import LEFT_OUT, load_tokenizer, names_a_file, run_pairs, run_prompts, window_of
from bandpo.train.folder import method_of, mistakes_of_folder
from bandpo.train.models import loadable, unmade
from bandpo.train.needs import needs, sampler_line
from bandpo.train.rewards import CheckedReward, checked_reward
from bandpo.train.steps import plan_lines, plan_mistakes

_MARKS: dict[Level, str] = {"ok": "ok", "note": "--", "warning": "??", "problem": "!!"}
_MEASURED_ROWS, _REWARDED_ROWS = 1000, 32
_SHOWN = 600  # characters of an example prompt
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


class Report:
    """What a dry run has found; each line is printed as a comment of YAML.

    Args:
        write: Prints a line.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self.mistakes: list[str] = []
        """What the run could not start with."""
        self.problems = 0
        """Findings that a run would start with, and that are wrong."""

    def say(self, text: str, level: Level = "note") -> None:
        """Print a finding.

        Args:
            text: The finding; its further lines are indented.
            level: Level of the finding.
        """
        self.problems += level == "problem"
        first, *others = text.splitlines() or [""]
        for line in (f"{_MARKS[level]} {first}", *(f"   {line}" for line in others)):
            self._write(f"# {printable(redact_text(line))}".rstrip())

    def wrong(self, text: str) -> None:
        """Print a mistake, with which the run would not start.

        Args:
            text: The mistake, with the fix.
        """
        if text not in self.mistakes:
            self.mistakes.append(text)
            self.say(text, "problem")
            self.problems -= 1

    @contextmanager
    def attempt(self) -> Generator[None]:
        """Take a refusal of the block for a mistake, so that the checks after it are made too.

        Returns:
            A context for the block.
        """
        try:
            yield
        except MistakesError as error:
            for mistake in error.mistakes:
                self.wrong(mistake)
        except (ValueError, OSError, ImportError, RunError) as error:
            self.wrong(str(error) or type(error).__name__)


class _Model(NamedTuple):
    """What is known of the model of a run, without its weights."""

    tokenizer: Any
    config: Any
    window: int | None
    skeleton: torch.nn.Module
    """The model without memory for its weights."""


def dry_run(arguments: list[str]) -> int:
    """Check the run that the arguments describe, and print what was found, then its configuration as YAML.

    All checks are made that do not depend on a failed one. Nothing is fetched: what is not on this machine is named, and is not
    checked.

    Args:
        arguments: Command line after `bandpo train`.

    Returns:
        Exit status: 0 if nothing is wrong; 1 if the run would start, and a rule of the doctor or the check of a reward finds a
        problem.

    Raises:
        MistakesError: If the run would not start, with all mistakes.
    """
    quiet_hosts()
    main = PartialState().is_main_process
    out = sys.stdout
    report = Report((lambda line: print(line, file=out)) if main else lambda _: None)
    report.say("dry run: nothing was trained or fetched, and no folder of a run was made")
    machine = this_machine()
    with _offline(), exits_are_errors(), redirect_stdout(sys.stderr):  # what a reward prints is no YAML
        parsed = _configuration(arguments, report)
        if parsed is not None:
            _check(parsed, machine, report)
    if report.mistakes:
        raise MistakesError(report.mistakes)
    assert parsed is not None
    if main:
        print("#", _verdict(report.problems))
        given = {name: value for name, value in parsed.given.items() if name != "dry_run"}
        print(yaml.safe_dump(redact(given), sort_keys=False), end="")
    return int(report.problems > 0)


def _verdict(problems: int) -> str:
    return f"{problems} problem{'s' * (problems > 1)}: see !!" if problems else "nothing wrong was found"


@contextmanager
def _offline() -> Generator[None]:
    """Keep the libraries of the Hub from fetching anything."""
    places: list[tuple[Any, str]] = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (cast("Any", datasets).config, "HF_HUB_OFFLINE"),
    ]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _configuration(arguments: list[str], report: Report) -> Parsed | None:
    """The configuration; None where it has mistakes, which are those of bandpo's and of TRL's part."""
    try:
        return parse(arguments)
    except MistakesError as error:
        first = list(error.mistakes)
    except ValueError as error:
        first = [str(error)]
    for mistake in first:
        report.wrong(mistake)
    request = read(arguments, declared_by_trl)
    request.set_defaults()
    try:
        values = vars(request.declared.parser.parse_args(request.arguments))
    except ValueError:  # a value of the wrong type, which is among the mistakes; the others cannot be compared with it
        return None
    ours = {name: values[name] for name in run_keys()}
    theirs = {name: value for name, value in values.items() if name not in ours}
    [trainer] = [cls for cls in cast("Any", request.declared.parser).dataclass_types if cls is not RunConfig]
    with report.attempt():
        RunConfig(**ours)
    with report.attempt():
        trainer(**theirs | {"use_cpu": True, "bf16": False, "fp16": False})
    report.say("model, data and rewards are checked when the configuration is right")
    return None


def _check(parsed: Parsed, machine: Machine, report: Report) -> None:
    run, args, given, compute = parsed
    report.say(f"configuration: {method_of(run, args)} on {run.task or run.dataset}, seed {args.seed}", "ok")
    report.say(
        compute.line or f"computing on {'the CPU' if compute.use_cpu else machine.name}, in the precision that is set"
    )
    for mistake in mistakes_of_folder(run, args, given):
        report.wrong(mistake)
    _check_reporters(args, report)
    if run.method == "grpo":
        with report.attempt():
            _refused_by_trainer(args)
        if ":" in args.objective:
            _own_objective(args, report)
    model = _model(run, args, report)
    prompts, held_out = _data(run, args, model, report)
    _rewards(run, prompts, model, report)
    longest = None
    if model is not None and prompts is not None:
        longest = _lengths(run, args, prompts, model, report)
    if prompts is not None and held_out is not None:
        counts = len(prompts), len(held_out)
        for mistake in plan_mistakes(run, args, *counts):
            report.wrong(mistake)
        for line in plan_lines(run, args, *counts):
            report.say(line)
    if model is not None:
        _memory(run, args, model, longest, machine, report)
    if (sampler := sampler_line(args, machine)) is not None:
        report.say(sampler)
    _doctor(run, args, model, report)
    for need in needs(run, args, machine):
        report.say(f"this machine differs: {need}", "warning")


def _check_reporters(args: TrainerConfig, report: Report) -> None:
    try:
        check_reporters(args)
    except ValueError as error:
        if error.__cause__ is None:
            report.wrong(str(error))
        else:
            report.say(f"this machine differs: {error}", "warning")


def _own_objective(args: Any, report: Report) -> None:
    """Try the parts of the user's own objective, which `bandpo.testing` has checks for."""
    try:
        objective = args.resolve()
    except (ValueError, TypeError, ImportError):
        return  # named among the mistakes already
    for part, check in (("bounds", check_bounds), ("surrogate", check_surrogate)):
        try:
            check(getattr(objective, part))
        except AssertionError as error:
            report.say(f"objective {args.objective}: its {part}: {error}", "problem")
        except Exception as error:
            report.say(
                f"objective {args.objective}: its {part} cannot be tried: the code {what_happened(error)} at {place_of(error)}",
                "problem",
            )
        else:
            report.say(f"objective {args.objective}: its {part} pass the checks of bandpo.testing", "ok")


def _refused_by_trainer(args: Any) -> None:
    """What the trainer refuses before it loads a model."""
    objective = args.resolve()
    refuse_sampler(objective, args, own_sampler=False)
    strategy_for(objective)(cast("Any", SimpleNamespace(objective=objective, args=args))).refuse(args)
    args.radius_rule(objective, steps=1)
    args.penalty_rule(objective)
    if (pruning := args.selector()) is not None:
        pruning.check(objective)


# ---- the model


def _model(run: RunConfig, args: TrainerConfig, report: Report) -> _Model | None:
    """Tokenizer and configuration of the model, with findings about both; None where they are not on this machine."""
    if run.model is None:
        return _small_model(run, report)
    name = run.model
    try:
        if (missing := unmade(name)) is not None:
            report.say(f"not checked: model {name}: {missing}")
            return None
        place = loadable(name, lambda _: None)
        if not Path(place).is_dir():
            if (why := _no_hub_name(place)) is not None:
                report.wrong(f"model {name!r}: {why}")
                return None
            if not isinstance(huggingface_hub.try_to_load_from_cache(place, "config.json"), str):
                report.say(f"not checked: model {name}, which is not on this machine and would be fetched from the Hub")
                return None
    except (ValueError, OSError) as error:
        report.wrong(str(error))
        return None
    with report.attempt():
        trusted = args.trust_remote_code
        tokenizer = load_tokenizer(place, trust_remote_code=trusted)
        config = _config_of(name, place, trusted)
        with torch.device("meta"):
            build = cast("Any", AutoModelForCausalLM).from_config
            skeleton = cast("torch.nn.Module", build(config, trust_remote_code=trusted))
        model = _Model(tokenizer, config, window_of(config), skeleton)
        _describe(run, place, model, report)
        return model
    return None


def _small_model(run: RunConfig, report: Report) -> _Model | None:
    if run.task is None:
        return None
    tokenizer = build_tokenizer()
    skeleton = build_model(WarmUp(task=run.task, steps=run.warm_up_steps), tokenizer)
    size = sum(p.numel() for p in skeleton.parameters())
    report.say(f"model: the built-in one of {size / 1e6:.2f}M parameters, warmed up on the task", "ok")
    return _Model(tokenizer, skeleton.config, window_of(skeleton.config), skeleton)


def _no_hub_name(name: str) -> str | None:
    """Why a name that is no folder cannot be fetched from the Hub either; None where it can be the name of a repository."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        return "there is no such folder or file"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return "there is no such folder or file, and it is no name of the Hub, which is ORGANISATION/NAME"
    return None


def _config_of(name: str, place: str, trusted: bool) -> Any:
    try:
        return cast("Any", AutoConfig).from_pretrained(place, trust_remote_code=trusted)
    except OSError as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from error


def _describe(run: RunConfig, place: str, model: _Model, report: Report) -> None:
    """Findings about the architecture, the weights, the vocabulary and the special tokens of a model."""
    config, tokenizer = model.config, model.tokenizer
    text = config.get_text_config()
    kind = next(iter(config.architectures or []), None) or config.model_type
    size = sum(p.numel() for p in model.skeleton.parameters())
    trained = "an adapter is trained" if run.lora_rank else "all of them are trained"
    window = "no limit" if model.window is None else f"{model.window} tokens"
    report.say(f"model: {run.model}, {kind}, {millions(size)} parameters; {trained}; window: {window}", "ok")
    if Path(place).is_dir() and not any(any(Path(place).glob(pattern)) for pattern in _WEIGHTS):
        report.wrong(f"model {run.model!r}: {place} has no weights (*.safetensors)")
    words, rows = len(tokenizer), int(text.vocab_size)
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= rows:
        report.say(
            f"the tokenizer has tokens up to number {last}, the model has {rows}: a text with a token beyond them ends the run",
            "warning",
        )
    template = "none: prompts are given as text" if tokenizer.chat_template is None else "yes"
    report.say(f"tokenizer: {words} tokens for {rows} rows of the embedding, chat template: {template}", "ok")
    ends = _end_tokens(place, config, tokenizer)
    if not ends:
        report.say(
            "neither the tokenizer nor the model has an end token, so that every completion has the full length",
            "warning",
        )
    if tokenizer.pad_token_id is None:
        report.say("the tokenizer has no token for padding, and the one for the end is used")


def _end_tokens(place: str, config: Any, tokenizer: Any) -> list[int]:
    try:
        ends = cast("Any", GenerationConfig).from_pretrained(place).eos_token_id
    except (OSError, ValueError):  # there is none, and transformers makes one of the model's configuration
        ends = getattr(config.get_text_config(), "eos_token_id", None)
    found = cast("list[int | None]", ends if isinstance(ends, list) else [ends])
    return [one for one in [*found, tokenizer.eos_token_id] if one is not None]


# ---- the data


def _data(
    run: RunConfig, args: TrainerConfig, model: _Model | None, report: Report
) -> tuple[Dataset | None, Dataset | None]:
    """What would be trained on, and the held-out prompts; None for what is not on this machine or has mistakes."""
    missing = [option for option in ("dataset", "eval_dataset", "pairs") if not _is_here(run, option, report)]
    if missing:
        return None, None
    kinds: list[str] = []

    def say(text: str) -> None:
        if LEFT_OUT not in text:
            report.say(text)
        elif run.bad_rows == "skip":
            report.say(text, "warning")
        else:
            kinds.append(text)

    found: tuple[Dataset | None, Dataset | None] = (None, None)
    # Rows of every kind are counted, and not the first kind only.
    lenient = dataclasses.replace(run, bad_rows="skip")
    tokenizer, window = (None, None) if model is None else (model.tokenizer, model.window)
    with report.attempt():
        stand_in = tokenizer or SimpleNamespace(chat_template=None if run.shots is None else "not known")
        completion = args.max_completion_length or DEFAULT_LENGTH
        prompts, held_out = run_prompts(lenient, stand_in, window, completion=completion, seed=args.seed, say=say)
        if run.pairs is not None:
            if tokenizer is None:
                report.say(f"not checked: pairs {run.pairs}, without the tokenizer of the model")
                return None, held_out
            limit = cast("int | None", getattr(args, "max_length", None))
            prompts = run_pairs(lenient, held_out, tokenizer, window, max_length=limit, say=say)
        found = prompts, held_out
        what = "pairs" if run.pairs else "prompts"
        source = f"task {run.task}" if run.task else f"{run.dataset}"
        report.say(f"data: {source}: {len(prompts)} {what} to train on, {len(held_out)} held out", "ok")
    for kind in kinds:
        report.wrong(kind.partition(LEFT_OUT)[0] + "; mend them, or set bad_rows: skip")
    return found


def _is_here(run: RunConfig, option: str, report: Report) -> bool:
    """Whether a dataset that a run names is on this machine; a missing file is a mistake, a dataset of the Hub is not."""
    name = cast("str | None", getattr(run, option))
    if name is None:
        return True
    if names_a_file(name):
        if not Path(name).is_file():
            report.wrong(f"{option} {name!r}: no such file")
            return False
        return True
    if Path(name).is_dir():
        return True
    if (why := _no_hub_name(name)) is not None:
        report.wrong(f"{option} {name!r}: {why}")
        return False
    split = run.eval_dataset_split if option == "eval_dataset" else run.dataset_split
    try:
        datasets.load_dataset(name, None if option == "pairs" else run.dataset_config, split=split)
    except Exception as error:  # whatever the libraries raise, it is not on this machine, or not in this split
        report.say(
            f"not checked: {option} {name}, which is not on this machine and would be fetched from the Hub "
            f"({type(error).__name__})"
        )
        return False
    return True


def _lengths(run: RunConfig, args: Any, prompts: Dataset, model: _Model, report: Report) -> int:
    """Tell the lengths of prompts and answers in tokens, and show a prompt as the model gets it; the largest length."""
    step = max(1, -(-len(prompts) // _MEASURED_ROWS))
    rows = prompts.select(range(0, len(prompts), step))
    template: dict[str, Any] = getattr(args, "chat_template_kwargs", None) or {}
    texts = [_rendered(prompt, model.tokenizer, template) for prompt in _column(rows, "prompt")]
    is_chat = not isinstance(rows["prompt"][0], str)
    ids: list[list[int]] = model.tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]
    sizes = sorted(len(one) for one in ids)
    completion = args.max_completion_length or DEFAULT_LENGTH
    middle, most = sizes[len(sizes) // 2], sizes[-1]
    window = "" if model.window is None else f"; window {model.window}"
    report.say(
        f"prompts of {len(sizes)} rows in tokens: least {sizes[0]}, median {middle}, 95% up to "
        f"{sizes[int(0.95 * (len(sizes) - 1))]}, most {most}; completions up to {completion}{window}",
        "ok",
    )
    beyond = max((max(one, default=0) for one in ids), default=0)
    words = int(model.config.get_text_config().vocab_size)
    if beyond >= words:
        report.wrong(
            f"prompts have token number {beyond}, and the model has {words}: its tokenizer is that of another model"
        )
    for name in ("chosen", "rejected") if run.pairs else ("answer",):
        if name in rows.column_names:
            _answers(name, [_text(x) for x in _column(rows, name)], completion, model.tokenizer, run, report)
    shown = texts[0] if len(texts[0]) <= _SHOWN else f"{texts[0][:_SHOWN]} ... ({len(texts[0])} characters)"
    report.say("the first prompt as the model gets it:\n" + "\n".join(f"| {line}" for line in shown.splitlines()))
    return most + completion


def _answers(name: str, texts: list[str], completion: int, tokenizer: Any, run: RunConfig, report: Report) -> None:
    sizes = sorted(len(one) for one in tokenizer(texts, add_special_tokens=False)["input_ids"])
    long = sum(size > completion for size in sizes)
    said = f"column {name} in tokens: median {sizes[len(sizes) // 2]}, most {sizes[-1]}"
    if long and run.pairs is None:
        report.say(
            f"{said}; {long} of {len(sizes)} are longer than max_completion_length={completion}: completions of that length "
            "would be cut off",
            "warning",
        )
    else:
        report.say(said, "ok")


def _rendered(prompt: Any, tokenizer: Any, options: dict[str, Any]) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **options))


def _text(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return "".join(str(part["content"]) for part in cast("list[dict[str, Any]]", value))


def _column(rows: Dataset, name: str) -> list[Any]:
    return list(cast("Iterable[Any]", rows[name]))


# ---- the rewards


def _rewards(run: RunConfig, prompts: Dataset | None, model: _Model | None, report: Report) -> None:
    """Import each reward, and call it on the first rows' own answers, as `bandpo check-reward` does."""
    found: list[CheckedReward] = []
    for name in run.rewards:
        with report.attempt():
            found.append(checked_reward(run, name, folder=None, say=lambda _: None))
    if prompts is None or model is None or "answer" not in prompts.column_names:
        for reward in found:
            report.say(f"reward {reward.name}: found; not called, without prompts that have an answer", "ok")
        return
    rows = prompts.select(range(min(_REWARDED_ROWS, len(prompts))))
    for reward in found:
        with report.attempt():
            checked = checked_answers(reward, rows, run)
            lines: list[str] = []
            told_answers(checked, rows, lines.append)
            report.say("\n".join(lines).partition(" ")[2], "ok" if checked.is_fine else "problem")


# ---- memory, and the doctor


def _memory(run: RunConfig, args: Any, model: _Model, longest: int | None, machine: Machine, report: Report) -> None:
    with report.attempt():
        try:
            shape = memory.shape_of(model.skeleton, model.config, lora_rank=run.lora_rank)
        except AttributeError:  # an architecture that names its sizes in another way
            report.say("memory: no estimate for a model of this architecture")
            return
        parts = memory.estimate(shape, _load(run, args, model, longest))
        told = ", ".join(f"{name} {memory.size(number)}" for name, number in parts.items() if name != "peak")
        said = (
            f"memory: about {memory.size(parts['peak'])} at the peak of each process, without the libraries (an estimate, see "
            f"docs/train.md: {told})"
        )
        available = memory.memory_of(machine, use_cpu=args.use_cpu)
        if available is not None:
            said += f"; {available[0]} has {memory.size(available[1])}"
        report.say(said, "warning" if available is not None and parts["peak"] > available[1] else "ok")


def _load(run: RunConfig, args: Any, model: _Model, longest: int | None) -> memory.Load:
    """What a process of the run computes at once."""
    completion = args.max_completion_length or DEFAULT_LENGTH
    length = longest or (2 * completion if model.window is None else min(model.window, 2 * completion))
    batch = args.per_device_train_batch_size
    evaluated = args.per_device_eval_batch_size
    if run.method == "grpo":
        # vLLM has memory of its own, which vllm_gpu_memory_utilization decides.
        sampled = 0 if args.use_vllm else batch * args.steps_per_generation
        reference = bool(args.beta) and not run.lora_rank
    else:
        sampled = 0 if run.pairs else args.generation_batch_size
        batch, reference = 2 * batch, not run.lora_rank
    return memory.Load(
        sequences=batch,
        length=length,
        sampled=max(sampled, evaluated),
        checkpointing=bool(args.gradient_checkpointing),
        half=bool(args.bf16 or args.fp16),
        reference=reference,
        on_cpu=bool(args.use_cpu),
    )


def _doctor(run: RunConfig, args: TrainerConfig, model: _Model | None, report: Report) -> None:
    if run.method != "grpo":
        report.say(f"doctor: method {run.method} has no trust region on ratios, so no rule applies")
        return
    vocabulary = None if model is None else int(model.config.get_text_config().vocab_size)
    with report.attempt():
        found = examine(args, vocabulary=vocabulary)
        fine = [f.rule for f in found if f.level == "ok"]
        report.say(f"doctor: fine: {', '.join(fine) or 'no rule'}", "ok")
        for finding in _worst_first(found):
            more = [f"{name}: {text}" for name, text in (("why", finding.cause), ("set", finding.knob)) if text]
            report.say("\n".join([f"doctor: {finding.rule}: {finding.seen}", *more]), finding.level)


def _worst_first(found: Sequence[Finding]) -> list[Finding]:
    order = ("problem", "warning", "note")
    return sorted((f for f in found if f.level in order), key=lambda f: order.index(f.level))
