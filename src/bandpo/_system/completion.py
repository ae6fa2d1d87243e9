"""Completion of the command line in bash, zsh and fish: scripts that know every command and option, and run no Python."""

import argparse
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bandpo._system.options import parsers_below

SHELLS = ("bash", "zsh", "fish")
"""The shells that there are scripts for."""

_FILES = frozenset({"FILE", "FILE.yaml", "PATH", "DIR", "FOLDER", "MODEL"})
"""Placeholders of files and folders in the help."""


class Option(NamedTuple):
    """An option, or the words of a command that are no options."""

    names: tuple[str, ...]
    help: str
    words: tuple[str, ...] = ()
    """The values that it takes, as far as they are known."""
    files: bool = False
    """Whether its value is a file or folder."""
    value: bool = True
    """Whether it takes a value."""
    listed: bool = False
    """Whether the value may be several of the words with commas between them."""


class Completed(NamedTuple):
    """A command with everything that can be typed after it."""

    name: str
    help: str
    options: tuple[Option, ...]
    rest: Option
    """The words that are no options."""


class Known(NamedTuple):
    """What is known of the values of options, by their destinations in all commands."""

    words: Mapping[str, Sequence[str]]
    """Values."""
    files: Collection[str] = ()
    """Options whose values are files or folders, besides those whose parsers show it."""
    lists: Collection[str] = ()
    """Options whose values are several words with commas between them."""


def completed(name: str, help: str, actions: Iterable[argparse.Action], known: Known) -> Completed:
    """What can be typed after a command.

    Args:
        name: Name of the command.
        help: Line of its help.
        actions: The actions of its parser; those of parsers below it are added.
        known: What is known of values.
    """
    found: dict[str, Option] = {}
    rest = Option((), "")
    for action in _all(actions):
        option = Option(
            tuple(action.option_strings),
            _line(action.help),
            tuple(str(w) for w in known.words.get(action.dest, action.choices or ())),
            action.type is Path or action.metavar in _FILES or action.dest in known.files,
            action.nargs != 0,
            action.dest in known.lists,
        )
        if option.names:
            found.setdefault(option.names[0], option)
        else:  # words without a dash, or the names of the parsers below, which may have such words themselves
            words = tuple(dict.fromkeys([*rest.words, *option.words]))
            rest = option._replace(words=words, files=rest.files or option.files)
    return Completed(name, help, tuple(found.values()), rest)


def script(shell: str, commands: Sequence[Completed]) -> str:
    """The script of a shell.

    Args:
        shell: One of `SHELLS`.
        commands: The commands.

    Returns:
        The text of the script, which a shell reads when it starts.
    """
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def _all(actions: Iterable[argparse.Action]) -> Iterable[argparse.Action]:
    """The actions, and those of all parsers below."""
    for action in actions:
        yield action
        for parser in parsers_below(action):
            yield from _all(parser._actions)


def _line(text: str | None) -> str:
    """The first part of a help text, without characters that mean something to a shell."""
    first = re.split(r"[.;:(]\s|\s\(|$", text or "", maxsplit=1)[0]
    return re.sub(r"[\[\]\"`\\$:%]", "", first)[:80].strip().replace("'", "’")


def _bash(commands: Sequence[Completed]) -> str:
    names = " ".join(c.name for c in commands)
    values: dict[tuple[tuple[str, ...], bool], list[str]] = {}
    for command in commands:
        for option in command.options:
            if option.words or (option.value and command.rest.words):
                patterns = (f'"{command.name} {name}"' for name in option.names)
                values.setdefault((option.words, option.listed), []).extend(patterns)
    lines = ["# Completion of bandpo for bash: source <(bandpo completion bash)", *_BASH_HEAD.splitlines()]
    lines += [f'        _bandpo_words "{names}"', "        return", "    fi", '    case "$command $previous" in']
    for (words, listed), patterns in values.items():
        call = f'{"_bandpo_list" if listed else "_bandpo_words"} "{" ".join(words)}"; ' if words else ""
        lines += [f"        {' | '.join(patterns)}) {call}return ;;"]  # nothing: bash completes files
    lines += ["    esac", '    case "$command" in']
    for command in commands:
        options = " ".join(name for option in command.options for name in option.names)
        rest = " ".join(command.rest.words)
        other = f'_bandpo_words "{rest}"' if rest else ":"
        lines += [
            f'        {command.name}) if [[ $current == -* ]]; then _bandpo_words "{options}"; else {other}; fi ;;'
        ]
    return "\n".join([*lines, "    esac", "}", "complete -o bashdefault -o default -F _bandpo bandpo", ""])


_BASH_HEAD = """
_bandpo_words() {
    COMPREPLY=($(compgen -W "$1" -- "$current"))
}

_bandpo_list() {  # the last part of a list with commas
    local before=""
    [[ $current == *,* ]] && before="${current%,*},"
    COMPREPLY=($(compgen -P "$before" -W "$1" -- "${current##*,}"))
}

_bandpo() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" command="" i
    COMPREPLY=()
    if [[ $current == "=" ]]; then  # --option=
        current=""
    elif [[ $previous == "=" ]]; then  # --option=value
        previous="${COMP_WORDS[COMP_CWORD-2]}"
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${COMP_WORDS[i]} != -* ]]; then command="${COMP_WORDS[i]}"; break; fi
    done
    if [[ -z $command ]]; then
        [[ $current == -* ]] && { _bandpo_words "--help --version"; return; }"""


def _zsh(commands: Sequence[Completed]) -> str:
    lines = [
        "#compdef bandpo",
        "# Completion of bandpo for zsh: source <(bandpo completion zsh), after compinit",
        "",
        "_bandpo() {",
        "    local curcontext=$curcontext state line",
        "    local -a commands",
        "    typeset -A opt_args",
        "    _arguments -C '(- *)--help[show the commands]' '(- *)--version[show the version]' \\",
        "        '1:command:->command' '*::argument:->arguments'",
        "    case $state in",
        "        command)",
        "            commands=(",
        *(f"                '{c.name}:{_line(c.help)}'" for c in commands),
        "            )",
        "            _describe command commands ;;",
        "        arguments)",
        "            case $line[1] in",
    ]
    for command in commands:
        specs = [f"'{name}[{o.help}]{_zsh_value(o)}'" for o in command.options for name in o.names]
        rest = command.rest
        if rest.words or rest.files:
            specs.append(f"'*{_zsh_value(rest)}'")
        lines += [f"                {command.name})", "                    _arguments \\"]
        lines += [f"                        {spec} \\" for spec in specs]
        lines += ["                        ;;"]
    lines += ["            esac ;;", "    esac", "}", ""]
    return "\n".join(
        [*lines, 'if [[ $funcstack[1] == _bandpo ]]; then _bandpo "$@"; else compdef _bandpo bandpo; fi', ""]
    )


def _zsh_value(option: Option) -> str:
    """The part of an argument's specification that says what it takes."""
    if not option.value:
        return ""
    if option.listed and option.words:
        return f":value:{{_values -s , value {' '.join(option.words)}}}"
    if option.words:
        return f":value:({' '.join(option.words)})"
    return ":file:_files" if option.files else ":value:"


def _fish(commands: Sequence[Completed]) -> str:
    lines = ["# Completion of bandpo for fish: bandpo completion fish | source", "complete -c bandpo -f"]
    lines += [f"complete -c bandpo -n __fish_use_subcommand -a {c.name} -d '{_line(c.help)}'" for c in commands]
    lines += ["complete -c bandpo -n __fish_use_subcommand -l help -d 'show the commands'"]
    lines += ["complete -c bandpo -n __fish_use_subcommand -l version -d 'show the version'"]
    for command in commands:
        begin = f"complete -c bandpo -n '__fish_seen_subcommand_from {command.name}'"
        for option in command.options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            lines.append(f"{begin} {names}{_fish_value(option)} -d '{option.help}'")
        if command.rest.words:
            lines.append(f"{begin} -a '{' '.join(command.rest.words)}'")
        elif command.rest.files:
            lines.append(f"{begin} -F")
    return "\n".join([*lines, ""])


def _fish_value(option: Option) -> str:
    if not option.value:
        return ""
    words = " ".join(option.words)
    if option.listed and words:
        return f" -x -a '(__fish_append , {words})'"
    return f" -x -a '{words}'" if words else " -r -F" if option.files else " -x"
