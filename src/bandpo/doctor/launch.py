"""Reads the settings of a run from its launch script, or from a list of overrides, in the manner of its host.

Nothing is executed. Hosts take settings as `key=value` (Hydra, OmegaConf) or as `--option value` (argparse); a `Dialect` says
which, and what else is particular to one. A value that depends on a shell, an environment or another file is `UNKNOWN`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bandpo._system.bounded import read_regular
from bandpo._system.secrets import redact_arguments
from bandpo.doctor.hosts import host_of_script, not_readable
from bandpo.doctor.settings import MAX_KEY, UNKNOWN, Settings, Text, some
from bandpo.doctor.setup import Host, short
from bandpo.doctor.shell import Script, Word, read_script

MAX_SCRIPT_BYTES = 1 << 18
_SETTING = re.compile(r"[+~]{0,2}([A-Za-z_][\w-]*(?:[./@][\w-]+)*)=")
_OPTION = re.compile(r"--([A-Za-z][\w.-]*)(?:=|\Z)")
_LONGEST, _MOST_COMPARED = 80, 500  # characters of a key, and keys, that are compared with those that are known
_MOST_LINES, _MOST_WORDS = (
    100,
    20,
)  # lines that are made of words which are not resolved, and words of one that are shown
_PRINTING = ("echo", "printf", "cat")
_SEVERAL = re.compile(r"\[[@*]\]|\$[@*]|ARGS?\b|OPT(?:ION)?S\b|FLAGS\b|EXTRA", re.IGNORECASE)
_CONFIG = ("--config", "-cn", "-cp", "-cd")  # beginnings of Hydra's options that name a configuration
_SHAPE_OF_MODEL = re.compile(r"\$\{MODEL_ARGS\[@\]\}")


@dataclass(frozen=True)
class Dialect:
    """How the command line of a host is read.

    Args:
        host: The host.
        defaults: The host's defaults, by key.
        program: Matches the word of a command that is the host's program; the settings come after it.
        called: What that program is called, for messages.
        likely: Matches other programs of the host's public source that keep its defaults; None for none.
        own: Beginnings of keys that only this host has.
        options: Whether settings are `--option value`; else they are `key=value`.
        names: Other spellings of keys.
        flags: Options without a value, with what each sets: key and value.
        config_options: Options that name a configuration file.
        configs: Names of configuration files whose content is `defaults`.
        watched: Beginnings of keys that matter for the trust region; those that the reader does not know are listed.
        known: Keys in `watched` that it knows and need not look at.
        needs_own: Whether a command of the program is the host's only if it has one of `own`.
    """

    host: Host
    defaults: Mapping[str, Any]
    program: re.Pattern[str]
    called: str
    own: tuple[str, ...]
    options: bool = False
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    flags: Mapping[str, tuple[str, Any]] = field(default_factory=dict[str, "tuple[str, Any]"])
    config_options: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()
    needs_own: bool = False
    likely: re.Pattern[str] | None = None

    def key(self, word: Word) -> str | None:
        """The key that a word sets, None if it sets none.

        Args:
            word: A word of a command.
        """
        match = (_OPTION if self.options else _SETTING).match(word.text)
        if match is None or match.end() > word.known or len(match[1]) > MAX_KEY:
            return None
        name = match[1]
        if self.options and (flag := _flag(word.text, self)) is not None:
            return flag[0]
        return self.names.get(name, name)

    def is_program(self, word: Word) -> bool:
        """Whether a word is the host's program.

        Args:
            word: A word of a command.
        """
        text = word.text
        if not word.literal:  # what is after the last unknown part, such as /train.py in $ROOT/train.py
            text = text[max((end for _, end in word.unknown), default=len(text)) :]
        if not text or len(text) >= MAX_KEY or not (word.literal or text.startswith("/")):
            return False
        return any(p is not None and p.fullmatch(text) for p in (self.program, self.likely))

    def is_own(self, key: str | None) -> bool:
        """Whether a key is one that only this host has.

        Args:
            key: A key, or None.
        """
        return key is not None and key.startswith(self.own)

    def runs(self, command: Sequence[Word]) -> bool:
        """Whether a command runs the host, or has its settings as arguments of another program.

        Args:
            command: The words of a command.
        """
        keys = [self.key(word) for word in command]
        own = any(self.is_own(key) for key in keys)
        if any(self.is_program(word) for word in command):
            return own or self.is_named(command)
        return own and None in keys

    def is_named(self, command: Sequence[Word]) -> bool:
        """Whether a command has a program that only this host has.

        Args:
            command: The words of a command.
        """
        return not self.needs_own and any(w.literal and self.program.fullmatch(w.text) for w in command)


def parse_script(path: Path) -> Script:
    """The commands of a script.

    Args:
        path: The script, or a list of overrides.

    Raises:
        ValueError: If it is too large, nested too deeply or no regular file.
    """
    text = read_regular(path, MAX_SCRIPT_BYTES, follow=False).decode("utf-8", errors="replace")
    try:
        return read_script(text.replace("\x00", "\ufffd"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_of(script: Script, dialect: Dialect) -> bool:
    """Whether a script runs a host, or holds settings that only this host has.

    Args:
        script: The commands of the script.
        dialect: The host's dialect.
    """
    runs, bare, _ = _runs(script, dialect)
    keys = {dialect.key(word) for command in runs for word in command}
    keys = keys.union(*_elsewhere(script, runs, bare, dialect).values())
    return any(dialect.is_own(key) for key in keys) or any(dialect.is_named(command) for command in runs)


def settings_of(path: Path, script: Script, dialect: Dialect, overrides: Sequence[str] = ()) -> Settings:
    """The settings in a script.

    Args:
        path: The file, for messages.
        script: The commands of the script.
        dialect: The dialect of the host that it belongs to.
        overrides: Settings `key=value`, which replace those of the script.

    Raises:
        ValueError: If it belongs to another host, or has no settings.
    """
    runs, bare, listed = _runs(script, dialect)
    elsewhere = _elsewhere(script, runs, bare, dialect)
    if not is_of(script, dialect):
        host = host_of_script(script)
        if host or any(dialect.key(word) for command in script.commands for word in command):
            raise not_readable(path, host)
        raise ValueError(f"{path}: no setting of a host in it")
    settings = _merged([_from_command(command, dialect, listed=listed) for command in runs], dialect)
    for name, keys in elsewhere.items():
        settings.unread.append(f"{name} sets {some(keys)}, which is not resolved")
        settings.given |= dict.fromkeys(keys, UNKNOWN)
    settings.unread += [f"{short(what)} may set any variable" for what in script.opened]
    settings.unread += [f"the here-document that ends with {name} is not read" for name in script.here]
    if "@" in script.assumed:
        settings.unread.append("$@ (the arguments of the script) is taken as empty")
    unset = [name for name in script.assumed if name != "@"]
    if unset:
        settings.unread.append(f"taken as not set in the environment: {some(unset)}")
    settings.given |= given_by(overrides, dialect)
    return settings


def given_by(overrides: Sequence[str], dialect: Dialect) -> dict[str, Any]:
    """The settings in overrides of the doctor's own command line.

    Args:
        overrides: Texts `key=value`; for a flag the value is true or false.
        dialect: The dialect of the host.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        name, _, value = override.partition("=")
        name = name.lstrip("+~-")
        flag = dialect.flags.get(name)
        given[flag[0] if flag else dialect.names.get(name, name)] = Text(value)
    return given


def note_unknown(settings: Settings, dialect: Dialect) -> None:
    """List the keys that may matter for the trust region and that the reader does not know.

    The value of a key that one of them resembles is not known, because it may have been meant.

    Args:
        settings: The settings of the file.
        dialect: The dialect of the host.
    """
    known = {*dialect.defaults, *dialect.known}
    strange = [key for key in settings.given if key not in known and len(key) <= _LONGEST]
    missing = [key for key in dialect.defaults if key not in settings.given]
    for key in strange[:_MOST_COMPARED]:
        group, _, last = key.rpartition(".")
        names = {name.rpartition(".")[2]: name for name in missing if name.rpartition(".")[0] == group}
        near = [name for name in names if name.replace("-", "_") == last.replace("-", "_")]
        for name in near or difflib.get_close_matches(last, names, n=1, cutoff=0.88):
            settings.unread.append(f"{short(key)} is not {names[name]}, which may have been meant")
            settings.given[names[name]] = UNKNOWN
    watched = [key for key in strange if dialect.watched and key.startswith(dialect.watched)]
    if watched:
        settings.unread.append(f"not known to this reader, and not looked at: {some(watched)}")


def _runs(script: Script, dialect: Dialect) -> tuple[list[list[Word]], list[list[Word]], bool]:
    """The commands that run the host, those that are settings alone, and whether the whole file is a list of settings."""
    runs = [command for command in script.commands if dialect.runs(command)]
    bare = [command for command in script.commands if _is_bare(command, dialect)]
    listed = bool(bare) and len(bare) == len(script.commands)
    if listed:  # without a command that takes them
        runs, bare = [[word for command in bare for word in command]], []
    return runs, bare, listed


def _is_bare(command: Sequence[Word], dialect: Dialect) -> bool:
    if dialect.options:
        return dialect.key(command[0]) is not None
    return all(dialect.key(word) is not None for word in command)


def _elsewhere(
    script: Script, runs: Sequence[Sequence[Word]], bare: Sequence[Sequence[Word]], dialect: Dialect
) -> dict[str, tuple[str, ...]]:
    """Keys of settings that are not words of a command which runs the host, by where they are."""
    spoken = [
        w
        for command in script.commands
        if command[0].text not in _PRINTING
        for w in command
        if dialect.key(w) is None and len(w.text.split()) > 1
    ]
    found = {
        "a quoted text": _held(spoken, dialect),
        "a line outside of the command": _held([word for command in bare for word in command], dialect),
    }
    # A word that is not resolved may be the value of any variable.
    if not runs or any("open" in _roles(_arguments(command, dialect), dialect) for command in runs):
        found = {name: _held(words, dialect) for name, words in script.variables.items()} | found
    return {name: keys for name, keys in found.items() if keys}


_Role: TypeAlias = Literal["key", "value", "shape", "open", "other"]


def _roles(words: Sequence[Word], dialect: Dialect) -> list[_Role]:
    """What each word after the program is.

    A key (with its value, or an option), a value of the option before it, the shape of a model, a word that is not resolved
    and may be any settings, or nothing that counts.
    """
    roles: list[_Role] = []
    takes = False  # whether the option before takes values
    for word in words:
        if dialect.key(word) is not None:
            roles.append("key")
            takes = dialect.options and "=" not in word.text and _flag(word.text, dialect) is None
            continue
        if not word.literal and dialect.options and _SHAPE_OF_MODEL.fullmatch(word.text):
            roles.append("shape")
        elif takes and not word.text.startswith("--") and (word.literal or not _SEVERAL.search(word.text)):
            roles.append("value")
            continue
        else:
            roles.append("other" if word.literal else "open")
        takes = False
    return roles


def _flag(option: str, dialect: Dialect) -> tuple[str, Any] | None:
    """The key and the value that an option without a value sets, None for an option that takes one."""
    return dialect.flags.get(option[2:].partition("=")[0])


def _arguments(command: Sequence[Word], dialect: Dialect) -> list[Word]:
    """The words after the program; where that is not known, those after the `--` of `ray job submit`."""
    at = next((i for i, word in enumerate(command) if dialect.is_program(word)), None)
    if at is None and [word.text for word in command[:3]] == ["ray", "job", "submit"]:
        at = next((i for i, word in enumerate(command) if word.text == "--"), None)
    return list(command[0 if at is None else at + 1 :])


def _from_command(command: Sequence[Word], dialect: Dialect, *, listed: bool) -> Settings:
    """The settings of one command."""
    program = next((word.text for word in command if dialect.is_program(word)), "")
    settings = Settings(dialect.defaults, defaults=listed or bool(program), program=program)
    words = _arguments(command, dialect)
    unresolved = (_read_options if dialect.options else _read_overrides)(words, dialect, settings)
    if unresolved:
        settings.unread.append(f"not resolved: {some(unresolved)}")
    if not settings.defaults and not program and not listed:
        settings.unread.append(
            f"the program that this runs is not {dialect.host}'s {dialect.called}: its defaults are not known"
        )
    if program and not dialect.program.fullmatch(program):
        settings.unread.append(f"{short(program)} is taken to have the defaults of {dialect.host}'s {dialect.called}")
    return settings


def _read_overrides(words: Sequence[Word], dialect: Dialect, settings: Settings) -> list[str]:
    """Read `key=value` into the settings; the words whose value is not resolved."""
    unresolved: list[str] = []
    named: dict[str, str] = {}
    for i, word in enumerate(words):
        key = dialect.key(word)
        if key is not None:
            known = word.literal
            settings.given[key] = Text(word.text.partition("=")[2]) if known else UNKNOWN
            if not known:
                # Only the first few are printed, and a search for secrets in each of thousands takes seconds.
                unresolved.append(_shown(words, i).lstrip("+~") if len(unresolved) <= _MOST_LINES else key)
        elif word.text.startswith(_CONFIG):
            option, equals, value = word.text.partition("=")
            named[option] = value if equals else words[i + 1].text if i + 1 < len(words) else ""
        elif not word.literal and not _is_value_of_config(words, i):
            if len(settings.unread) <= _MOST_LINES:
                settings.unread.append(f"{_shown(words, i)} is not resolved and may set anything")
            settings.defaults = False
    _note_config(named, dialect, settings)
    return unresolved


def _is_value_of_config(words: Sequence[Word], i: int) -> bool:
    """Whether a word is the value of an option which names a configuration: it is named with that option."""
    return i > 0 and words[i - 1].text.startswith(_CONFIG) and "=" not in words[i - 1].text


def _note_config(named: Mapping[str, str], dialect: Dialect, settings: Settings) -> None:
    """Note which configuration is named and not read, unless its content is the table of defaults."""
    elsewhere = {
        option: value
        for option, value in named.items()
        if option not in dialect.config_options or value.rpartition("/")[2].removesuffix(".yaml") not in dialect.configs
    }
    if not elsewhere:
        return
    options = " ".join(f"{option} {value}" for option, value in named.items())
    settings.unread.append(
        f"{options}: that configuration is not read, so what this script does not set is not known; examine it as a YAML file"
    )
    settings.defaults = False


def _read_options(words: Sequence[Word], dialect: Dialect, settings: Settings) -> list[str]:
    """Read `--option value` into the settings, as argparse does; the options whose value is not resolved."""
    unresolved: list[str] = []
    roles = _roles(words, dialect)
    for i, (word, role) in enumerate(zip(words, roles, strict=True)):
        if role == "open":
            if len(settings.unread) <= _MOST_LINES:
                settings.unread.append(f"{_shown(words, i)} is not resolved and may set anything")
            settings.defaults = False
        elif role == "shape" and len(settings.unread) <= _MOST_LINES:
            settings.unread.append(
                f"{_shown(words, i)} is not resolved; it is taken as the shape of a model, "
                f"as {dialect.host}'s own files set it"
            )
        key = dialect.key(word)
        if role != "key" or key is None:
            continue
        end = next((k for k in range(i + 1, len(words)) if roles[k] != "value"), len(words))
        _, equals, value = word.text.partition("=")
        values = [word] if equals else words[i + 1 : end]
        known = all(value.literal for value in values)
        flag = _flag(word.text, dialect)
        text = Text(value if equals else " ".join(value.text for value in values)) if known else UNKNOWN
        settings.given[key] = text if flag is None else flag[1]
        if not known and (key in dialect.defaults or (dialect.watched and key.startswith(dialect.watched))):
            unresolved.append(_shown(words, i, end) if len(unresolved) <= _MOST_LINES else key)
    return unresolved


def _shown(words: Sequence[Word], first: int, end: int = 0) -> str:
    """Words for a message, without secrets, with the line of the first; the word before tells whether it is a secret."""
    before = max(0, first - 1)
    shown = redact_arguments([word.text for word in words[before : max(end, first + 1)][:_MOST_WORDS]])
    line = words[first].line
    return " ".join(shown[first - before :]) + (f" (line {line})" if line else "")


def _merged(parts: Sequence[Settings], dialect: Dialect) -> Settings:
    """The settings that all commands of a script have in common."""
    if not parts:
        return Settings(dialect.defaults, defaults=False)
    first, *others = parts
    if not others:
        return first
    keys = {key for part in parts for key in part.given}
    same = {
        k: first.given[k] for k in first.given if all(k in p.given and p.given[k] == first.given[k] for p in others)
    }
    unread = list(dict.fromkeys(what for part in parts for what in part.unread))
    differing = sorted(keys - set(same))
    unread.append(
        f"{len(parts)} commands run {dialect.host}"
        + (f", and differ in {some(differing)}: examine them one by one" if differing else "")
    )
    given = {k: same.get(k, UNKNOWN) for k in keys}
    return Settings(dialect.defaults, given, all(p.defaults for p in parts), unread, program=first.program)


def _held(words: Iterable[Word], dialect: Dialect) -> tuple[str, ...]:
    """The keys of settings that texts contain (the value of a variable, a quoted text), each once."""
    found: dict[str, None] = {}
    for word in words:
        for part in word.text.split():
            key = dialect.key(Word(part, len(part)))
            if key is not None and ("." in key or (dialect.options and key in dialect.defaults)):
                found[key] = None
    return tuple(found)
