"""Splits a shell script into words without a shell: nothing is executed or expanded, and the time is linear in the length.

The literal beginning of a word is known; from the first expansion on ($NAME, ${...}, $(...), backticks) it is not.
"""

import re
from dataclasses import dataclass, field
from typing import Protocol

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|[0-9@*#?!$-])")
_HYDRA = re.compile(r"\$\{[A-Za-z_]\w*(?:\.\w+)+\}")  # ${a.b}: a dot cannot be in the name of a shell's variable
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)\+?=")
_HERE = re.compile(r"<<-?[ \t]*(['\"]?)([A-Za-z_]\w*)\1")
_CLOSING = {"(": ")", "{": "}"}


@dataclass(frozen=True)
class Word:
    """A word of a command.

    Args:
        text: The word without its quotes; expansions are left as they are written.
        known: Number of characters before the first expansion; all of them where there is none.
    """

    text: str
    known: int

    @property
    def literal(self) -> bool:
        """Whether the word contains no expansion."""
        return self.known == len(self.text)


@dataclass
class Script:
    """The commands and assignments of a script.

    Args:
        commands: The words of each command.
        variables: All values that are assigned to a name, in order; an array gives one value for each of its words.
        here: Delimiters of the here-documents; their text is not read.
    """

    commands: list[list[Word]] = field(default_factory=list[list[Word]])
    variables: dict[str, list[Word]] = field(default_factory=dict[str, list[Word]])
    here: list[str] = field(default_factory=list[str])


def read_script(text: str) -> Script:
    r"""Split a script into commands and assignments.

    Args:
        text: A script of a POSIX shell or of Bash.

    Returns:
        The words of its commands and the values of its variables.

    Examples:
        >>> script = read_script("N=4\npython -m train a.b=1 c.d=$N 'e f'  # why")
        >>> [(w.text, w.literal) for w in script.commands[0]]
        [('python', True), ('-m', True), ('train', True), ('a.b=1', True), ('c.d=$N', False), ('e f', True)]
        >>> script.variables["N"][0].text
        '4'
    """
    return _Reader(text).read()


class _Add(Protocol):
    """Appends a piece to the word that is read."""

    def __call__(self, piece: str, *, literal: bool = True) -> None: ...


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.script = text, 0, Script()
        self.command: list[Word] = []
        self.pending: list[str] = []  # here-documents whose text begins after this line

    def read(self) -> Script:
        text = self.text
        while self.at < len(text):
            c = text[self.at]
            if c == "\n":
                self.at += 1
                self._end_command()
                self._skip_here()
            elif c in " \t\r":
                self.at += 1
            elif text.startswith("\\\n", self.at) or text.startswith("\\\r\n", self.at):
                self.at = text.index("\n", self.at) + 1
            elif c == "#":
                self._skip_comment()
            elif c in ";&|()":
                self.at += 1
                self._end_command()
            elif c in "<>":
                self._redirect()
            else:
                self._argument()
        self._end_command()
        return self.script

    def _end_command(self) -> None:
        if self.command:
            self.script.commands.append(self.command)
            self.command = []

    def _skip_comment(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def _skip_here(self) -> None:
        for delimiter in self.pending:
            while self.at < len(self.text):
                end = self.text.find("\n", self.at)
                line = self.text[self.at : len(self.text) if end < 0 else end]
                self.at += len(line) + 1
                if line.strip() == delimiter:
                    break
        self.pending = []

    def _redirect(self) -> None:
        match = _HERE.match(self.text, self.at)
        if match is not None:
            self.pending.append(match[2])
            self.script.here.append(match[2])
            self.at = match.end()
        else:
            self.at += 1

    def _argument(self) -> None:
        """A word of the command, or an assignment before it."""
        match = None if self.command else _ASSIGNMENT.match(self.text, self.at)
        if match is None:
            self.command.append(self._word())
            return
        values = self.script.variables.setdefault(match[1], [])
        self.at = match.end()
        if self.text.startswith("(", self.at):
            self.at += 1
            values += self._array()
        else:
            values.append(self._word())

    def _array(self) -> list[Word]:
        words: list[Word] = []
        while self.at < len(self.text):
            c = self.text[self.at]
            if c == ")":
                self.at += 1
                break
            if c in " \t\r\n;&|<>(" or self.text.startswith("\\\n", self.at):
                self.at += 1
            elif c == "#":
                self._skip_comment()
            else:
                words.append(self._word())
        return words

    def _word(self) -> Word:
        text, pieces, known, length = self.text, list[str](), None, 0

        def add(piece: str, *, literal: bool = True) -> None:
            nonlocal known, length
            if not literal and known is None:
                known = length
            pieces.append(piece)
            length += len(piece)

        while self.at < len(text) and text[self.at] not in " \t\r\n;&|()<>":
            c = text[self.at]
            if c == "\\":
                if text.startswith("\\\n", self.at):
                    self.at += 2
                    continue
                add(text[self.at + 1 : self.at + 2])
                self.at += 2
            elif c == "'":
                end = text.find("'", self.at + 1)
                end = len(text) if end < 0 else end
                add(text[self.at + 1 : end])
                self.at = end + 1
            elif c == '"':
                self._quoted(add)
            elif c in "$`":
                self._expansion(add)
            else:
                end = self.at + 1
                while end < len(text) and text[end] not in " \t\r\n;&|()<>\\'\"$`":
                    end += 1
                add(text[self.at : end])
                self.at = end
        return Word("".join(pieces), length if known is None else known)

    def _quoted(self, add: _Add) -> None:
        text = self.text
        self.at += 1
        while self.at < len(text):
            c = text[self.at]
            if c == '"':
                self.at += 1
                return
            if c == "\\":
                if not text.startswith("\\\n", self.at):
                    escaped = text[self.at + 1 : self.at + 2]
                    add(escaped if escaped in '"\\$`' else c + escaped)
                self.at += 2
            elif c in "$`":
                self._expansion(add)
            else:
                end = self.at + 1
                while end < len(text) and text[end] not in '"\\$`':
                    end += 1
                add(text[self.at : end])
                self.at = end

    def _expansion(self, add: _Add) -> None:
        text, start = self.text, self.at
        hydra = _HYDRA.match(text, start)
        if hydra is not None:
            self.at = hydra.end()
            add(hydra[0])
            return
        variable = _VARIABLE.match(text, start)
        if variable is not None:
            self.at = variable.end()
        elif text[start] == "`" or text[start + 1 : start + 2] in _CLOSING:
            self._skip_nested()
        else:
            self.at += 1
            add("$")  # a dollar sign that begins no expansion
            return
        add(text[start : self.at], literal=False)

    def _skip_nested(self) -> None:
        """Skip to the end of ${...}, $(...), $((...)) or backticks, including what is nested and quoted in them."""
        text, closing = self.text, list[str]()
        while self.at < len(text):
            c = text[self.at]
            quoted = bool(closing) and closing[-1] in "\"'"
            if c == "\\" and not (closing and closing[-1] == "'"):
                self.at += 1
            elif closing and c == closing[-1]:
                closing.pop()
                if not closing:
                    self.at += 1
                    return
            elif closing and closing[-1] == "'":
                pass
            elif c == "$" and text[self.at + 1 : self.at + 2] in _CLOSING and text[self.at + 1 : self.at + 2]:
                self.at += 1
                closing.append(_CLOSING[text[self.at]])
            elif c == "`" or (c == '"' and not quoted) or (c == "'" and not quoted):
                closing.append(c)
            elif c == "(" and closing and closing[-1] == ")":
                closing.append(")")
            self.at += 1
        self.at = len(text)
