"""Reads commands of a shell script that train with TRL or ms-swift: `trl grpo ...`, `accelerate launch train.py --beta 0`.

A configuration that a command names is not opened: what the command does not set itself is then not known.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bandpo._system.bounded import parse_yaml
from bandpo.doctor.setup import Setup, short
from bandpo.doctor.shell import Script, Word, read_script

_OPTION = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_MANY = re.compile(r"\[[@*]\]|\$\{?[@*]|ARGS|OPTS|OPTIONS|EXTRA|FLAGS", re.IGNORECASE)  # expansions into several words
_NUMBER = re.compile(r"-?[.\d]")
_OF_A_NODE, _NODES = ("nproc_per_node", "num_gpus"), ("nnodes", "num_nodes")
_MODULE = "trl.scripts.grpo"  # with `python -m` and `accelerate launch -m`
_LAUNCHERS = frozenset({"accelerate", "torchrun", "deepspeed", "python", "python3", "uv", "accelerate-launch", "srun"})
_MAX_UNREAD = 12
OWN = frozenset(
    {
        "num_generations",
        "steps_per_generation",
        "num_iterations",
        "reward_funcs",
        "scale_rewards",
        "epsilon_high",
        "importance_sampling_level",
    }
)
"""Options that TRL's trainers with groups of completions have, and that no other framework's scripts use."""

_TRAINING = frozenset(
    {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "max_completion_length",
        "max_steps",
    }
)


@dataclass
class Options:
    """The options of a command.

    Args:
        values: Text of each option; a list of texts where it has several, True where it has none.
        unknown: Options whose value is not known, as they are written.
        opened: What may set any option.
        line: Line of the command.
        program: What runs: "trl", "swift", "megatron", or the name of a Python script.
        processes: Number of processes; 0 where the command does not tell.
    """

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    unknown: dict[str, str] = field(default_factory=dict[str, str])
    opened: list[str] = field(default_factory=list[str])
    line: int = 0
    program: str = ""
    processes: int = 0

    @property
    def config(self) -> str:
        """The configuration that the command names; "" for none."""
        value = self.values.get("config", "")
        return value if isinstance(value, str) else "a configuration" if "config" in self.unknown else ""


def with_overrides(given: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Keys and values with settings `key=value`, which replace them.

    Args:
        given: The keys and values.
        overrides: The settings.

    Examples:
        >>> with_overrides({"beta": 0.1, "epsilon": 0.2}, ["beta=0"])
        {'beta': 0, 'epsilon': 0.2}
    """
    changed = dict(given)
    for override in overrides:
        key, _, value = override.partition("=")
        changed[key] = parse_yaml(value, override)
    return changed


def read_launch(
    script: str, overrides: Sequence[str] = (), *, processes: int = 1, vocabulary: int | None = None
) -> Setup | None:
    """The settings in the commands of a script that train with TRL or ms-swift; None if it has none that sets anything.

    Args:
        script: Text of the script.
        overrides: Settings `key=value`, which replace those of the commands.
        processes: Number of processes that will train, where the command does not tell.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If it trains with another of their trainers, or they refuse a value.
    """
    words = read_script(script)
    swift = [found for command in words.commands if (found := _swift(command))]
    found = swift or [options for command in words.commands if (options := _trl(command))]
    if not found:
        return None
    options, notes = _common(found)
    notes += _of_script(words)
    options.values |= with_overrides({}, overrides)
    options.unknown = {key: text for key, text in options.unknown.items() if key not in options.values}
    if swift:
        from bandpo.doctor.swift import read_swift

        return read_swift(
            options.values,
            unknown=options.unknown,
            opened=options.opened,
            notes=notes,
            megatron=options.program == "megatron",
            vocabulary=vocabulary,
        )
    return _read_trl(options, notes, options.processes or processes, vocabulary)


def _read_trl(options: Options, notes: list[str], processes: int, vocabulary: int | None) -> Setup:
    from bandpo.doctor.trl import FLAGS, read_trl

    values = {key: _value(key, value) for key, value in options.values.items() if key != "config"}
    for key in FLAGS & {key.removeprefix("no_") for key in values if key.startswith("no_")}:
        values[key] = not values.pop(f"no_{key}")
    if options.config:
        options.opened.append(f"{options.config}, which the command names,")
        changes = " ".join(f"{k}={v}" for k, v in options.values.items() if k != "config" and isinstance(v, str))
        notes.append(
            f"examine that file with what the command changes: bandpo doctor {options.config} {short(changes)[1:-1]}"
        )
    if options.program.endswith(".py"):
        notes.append(f"{options.program} is not read: its own defaults are taken to be TRL's")
    return read_trl(
        values,
        processes=processes,
        vocabulary=vocabulary,
        unknown=options.unknown,
        opened=options.opened,
        notes=notes,
    )


def _of_script(script: Script) -> list[str]:
    """Lines about what the script leaves to its environment."""
    lines = [f"{short(what)} may set any variable" for what in script.opened[:_MAX_UNREAD]]
    if "@" in script.assumed:
        lines.append("$@ (the arguments of the script) is taken as empty")
    unset = [name for name in script.assumed if name != "@"]
    return lines + ([f"taken as not set in the environment: {', '.join(unset[:8])}"] if unset else [])


def _common(found: Sequence[Options]) -> tuple[Options, list[str]]:
    """The options that all commands have in common, and a line where there are several."""
    first, *others = found
    if not others:
        return first, []
    keys = {key for options in found for key in (*options.values, *options.unknown)}
    same = {k: v for k, v in first.values.items() if all(o.values.get(k) == v for o in others)}
    differ = sorted(keys - set(same))
    unknown = dict.fromkeys(differ, "(the commands differ)")
    opened = list(dict.fromkeys(what for options in found for what in options.opened))
    lines = ", ".join(str(options.line) for options in found[:8])
    note = f"{len(found)} commands train (lines {lines})"
    note += f", and differ in {', '.join(differ[:8])}: examine them one by one" if differ else ""
    alike = len({options.processes for options in found}) == 1
    return replace(first, values=same, unknown=unknown, opened=opened, processes=first.processes if alike else 0), [
        note
    ]


def _swift(command: Sequence[Word]) -> Options | None:
    """The options of a command of ms-swift that trains by reinforcement learning."""
    names = [Path(word.text[:300]).name for word in command]
    for program in ("swift", "megatron"):
        if program in names and names[names.index(program) + 1 : names.index(program) + 2] == ["rlhf"]:
            words = command[names.index(program) + 2 :]
            options = _options(words)
            if words and words[0].text.endswith((".yaml", ".yml", ".json")):
                options.values["config"] = words[0].text
            return replace(options, line=command[0].line, program=program)
    if names and any(name in ("rlhf.py",) and "swift" in word.text for name, word in zip(names, command, strict=True)):
        return replace(_options(command[names.index("rlhf.py") + 1 :]), line=command[0].line, program="swift")
    return None


def _trl(command: Sequence[Word]) -> Options | None:
    """The options of a command that trains with TRL's `GRPOTrainer`, where it sets at least one."""
    names = [Path(word.text[:300]).name for word in command]
    if "trl" in names and names[names.index("trl") + 1 : names.index("trl") + 2] == ["grpo"]:
        options = _options(command[names.index("trl") + 2 :])
        processes = _processes(options)
        if options.values.keys() <= {"config"} and not options.unknown:
            return None
        return _of_processes(replace(options, line=command[0].line, program="trl"), processes)
    at = next((i for i, name in enumerate(names) if name.endswith(".py") or name == _MODULE), -1)
    if at < 0 or not _LAUNCHERS & set(names[: at + 1]):
        return None
    options = _options(command[at + 1 :])
    given = {*options.values, *options.unknown}
    if not given & OWN or "rloo" in names[at] or not (given & _TRAINING or "grpo" in names[at]):
        return None
    processes = _processes(_options(command[:at]))
    return _of_processes(replace(options, line=command[0].line, program=names[at]), processes)


def _of_processes(options: Options, processes: int | None) -> Options:
    """The options with the number of processes, which share `generation_batch_size`: where it is not known, neither is that."""
    if processes is None and "generation_batch_size" in options.values:
        size = options.values.pop("generation_batch_size")
        options.unknown["generation_batch_size"] = (
            f"{short(size)[1:-1]}, shared by processes whose number is not known,"
        )
    return replace(options, processes=processes or 0)


def _processes(launcher: Options) -> int | None:
    """The number of processes that a launcher starts; 0 where it does not tell, None where what it tells is not known."""

    def given(*names: str) -> int | None:
        if not launcher.unknown.keys().isdisjoint(names):
            return None
        value = next((str(launcher.values.pop(name)) for name in names if name in launcher.values), "0")
        return int(value) if value.isdecimal() and len(value) < 6 else None

    total = given("num_processes")
    if total != 0:
        return total
    of_a_node, nodes = given(*_OF_A_NODE), given(*_NODES)
    return None if of_a_node is None or nodes is None else of_a_node * (nodes or 1)


def _options(words: Sequence[Word]) -> Options:
    """The options of a command as an argument parser takes them: `--name value`, `--name=value`, `--name a b`, `--name`."""
    found = Options()
    texts: dict[str, list[str]] = {}
    name = ""
    for word in words:
        match = _OPTION.fullmatch(word.text)
        if match and match.end(1) <= word.known and not _NUMBER.match(word.text):
            name = match[1].replace("-", "_")
            texts[name] = []
            found.unknown.pop(name, None)
            if match[2] is None:
                continue
            text = match[2]
        else:
            text = word.text
        if not word.literal:
            place = f" (line {word.line})" if word.line else ""
            if name and not texts[name] and not _MANY.search(text):
                found.unknown[name] = f"{short(text)[1:-1]}{place}"
            else:
                found.opened.append(f"{short(word.text)[1:-1]}{place}")
        elif name:
            texts[name].append(text)
    for key, values in texts.items():
        if key not in found.unknown:
            found.values[key] = True if not values else values[0] if len(values) == 1 else values
    return found


def _value(key: str, value: Any) -> Any:
    """An option as TRL's parser reads it: a number, a flag, a mapping or a text."""
    if not isinstance(value, str) or key in TEXTS:
        return value
    if value.lower() in ("yes", "y", "t"):
        return True
    if value.lower() in ("no", "n", "f"):
        return False
    try:
        return parse_yaml(value, key) if value else None
    except ValueError:
        return value


TEXTS = frozenset({"loss_type", "eval_strategy", "importance_sampling_level", "objective", "model_name_or_path", "kl"})
"""Options that stay text, also where it looks like a number or a flag."""
