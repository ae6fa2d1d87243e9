"""The parser of the command line: both spellings of options, the nearest name for a mistyped one, help in sections."""

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, cast

from bandpo._system.secrets import redact_text

_EXAMPLES = "examples:"


class ExampleFormatter(argparse.HelpFormatter):
    """Wraps texts, and keeps the lines of examples at their end."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        prose, _, examples = text.partition(_EXAMPLES)
        parts = [super()._fill_text(prose, width, indent)] if prose.strip() else []
        if examples:
            parts += ["\n".join(f"{indent}{line}" for line in (_EXAMPLES + examples).splitlines())]
        return "\n\n".join(parts)


class Parser(argparse.ArgumentParser):
    """A parser that takes `--a-b` and `--a_b`, and whose errors name the nearest option or command and show no secrets.

    The beginning of an option is not taken for it: it could be that of another option in a later version. The parsers of the
    commands below it are of the same class.

    Examples:
        >>> parser = Parser("x")
        >>> _ = parser.add_argument("--max-ratio", type=float)
        >>> parser.parse_args(["--max_ratio=3"]).max_ratio
        3.0
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": ExampleFormatter, "allow_abbrev": False, **kwargs})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does; an option that no parser knows is an error here, where the nearest one is known.

        Args:
            args: Words of the command line.
            namespace: Object that takes the values.
        """
        found, left = super().parse_known_args(None if args is None else self._respelled(args), namespace)
        unknown = next((a for a in left if a.startswith("-") and a != "-"), None)
        if unknown is not None:
            self.error(f"{self._unknown(unknown.partition('=')[0])} (all of them: {self.prog} --help)")
        return cast("argparse.Namespace", found), left

    def error(self, message: str) -> NoReturn:
        """End with status 2.

        Args:
            message: The message, whose secrets are hidden.
        """
        super().error(redact_text(message))

    def _respelled(self, args: Sequence[str]) -> list[str]:
        """The words of the command line with options in the spelling of their declaration, up to the word `--`."""
        spelled = {_plain(option): option for option in self._option_string_actions}
        words = list(args)
        end = words.index("--") if "--" in words else len(words)
        for i, word in enumerate(words[:end]):
            name, equals, value = word.partition("=")
            if name.startswith("--") and name not in self._option_string_actions and _plain(name) in spelled:
                words[i] = f"{spelled[_plain(name)]}{equals}{value}"
        return words

    def _unknown(self, option: str) -> str:
        known = [o for o in self._option_string_actions if o.startswith("--")]
        return f"unknown option {option}{did_you_mean(option.replace('_', '-'), known)}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is none of the choices, with the nearest one."""
        if action.choices is None or value in action.choices:
            return
        names = [str(c) for c in action.choices]
        hint = did_you_mean(str(value), names)
        if parsers_below(action):
            kind = "command" if action.dest == "command" else action.dest
            raise argparse.ArgumentError(None, f"unknown {kind} {value!r}{hint} (all of them: {', '.join(names)})")
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint} (choose from {', '.join(names)})")


def parsers_below(action: argparse.Action) -> list[argparse.ArgumentParser]:
    """The parsers of the commands that an action chooses from; none for an ordinary option.

    Args:
        action: An action of a parser.
    """
    choices: object = action.choices
    found = list(cast("dict[str, Any]", choices).values()) if isinstance(choices, dict) else []
    return [parser for parser in found if isinstance(parser, argparse.ArgumentParser)]


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing.

    Args:
        name: The unknown name.
        known: The names that are known.
        cutoff: The least similarity, as in `difflib`.

    Examples:
        >>> did_you_mean("trian", ["train", "doctor"]), did_you_mean("x", ["train"])
        ("; did you mean 'train'?", '')
    """
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def not_one_of(option: str, value: object, known: Iterable[str]) -> str:
    """A message about a value that is none of the known ones, with the nearest of them.

    Args:
        option: The option.
        value: The value.
        known: The values that are known, in their order.

    Examples:
        >>> not_one_of("task", "sms", ["countdown", "sums"])
        "task: got 'sms'; did you mean 'sums'? Choose one of countdown, sums"
    """
    names = list(known)
    hint = did_you_mean(str(value), names)
    return f"{option}: got {value!r}{f'{hint} Choose' if hint else '; choose'} one of {', '.join(names)}"


def put_in_sections(parser: argparse.ArgumentParser, sections: Mapping[str, Iterable[str]]) -> None:
    """Put options that are declared already into titled sections of the help; the others stay where they are.

    Args:
        parser: The parser.
        sections: The titles, each with the destinations of its options in their order.
    """
    options = parser._optionals._group_actions
    by_name = {action.dest: action for action in options}
    for title, names in sections.items():
        group = parser.add_argument_group(title)
        moved = [by_name[name] for name in names if name in by_name]
        group._group_actions.extend(moved)
        options[:] = [action for action in options if action not in moved]


def add_examples(parser: argparse.ArgumentParser, *lines: str) -> None:
    """Put examples at the end of the help of a command.

    Args:
        parser: The parser.
        *lines: Command lines without `bandpo`, each with an optional comment behind two spaces and `#`.
    """
    prose = [parser.epilog] if parser.epilog else []
    parser.epilog = "\n".join([*prose, _EXAMPLES, *(f"  bandpo {line}" for line in lines)])


def _plain(option: str) -> str:
    return option.replace("_", "-")
