"""The syntax of a shell script as a tree of statements, of POSIX shells and the part of Bash that launch scripts use.

Nothing is executed or expanded here, and the time is linear in the length. What is not understood becomes an `Opaque`
statement, which names the variables that it may change.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

MAX_DEPTH = 40  # statements within statements

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|[0-9@*#?!$-])")
_HYDRA = re.compile(r"\$\{[A-Za-z_]\w*(?:\.\w+)+\}")  # ${a.b}: a dot cannot be in the name of a shell's variable
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[([^\]\n=]*)\])?(\+?)=")
_NAME = re.compile(r"[A-Za-z_]\w*")
_HERE = re.compile(r"""<<-?[ \t]*(?:\\?([\w.!+%@^~-]+)|'([^'\n]+)'|"([^"\n]+)")""")
_REDIRECT = re.compile(r"&?(?:<<<|[<>]{1,2}[&|]?)[ \t]*")
_BRACES = re.compile(r"\{[^{}\s]*(?:,|\.\.)[^{}\s]*\}")
_CLOSING = {"(": ")", "{": "}"}
_BLANK, _ENDS = " \t\r", " \t\r\n;&|()<>"
_OPENING = {"if": "fi", "for": "done", "select": "done", "while": "done", "until": "done", "case": "esac", "{": "}"}
_INNER = frozenset({"then", "elif", "else", "do", "in"})
RESERVED = frozenset(_OPENING) | frozenset(_OPENING.values()) | _INNER | {"function", "[[", "!"}

Kind: TypeAlias = Literal["text", "variable", "arithmetic", "unknown"]


@dataclass(frozen=True)
class Part:
    """A piece of a word.

    Args:
        kind: Literal text, an expansion of a variable, arithmetic, or what only a shell can know.
        text: The text without quotes; of an expansion, as it is written.
        quoted: Whether it was in quotes or escaped.
    """

    kind: Kind
    text: str
    quoted: bool


@dataclass(frozen=True)
class Source:
    """A word as it is written.

    Args:
        parts: The pieces, in order.
        line: The line on which it begins, from 1.
    """

    parts: tuple[Part, ...]
    line: int

    @property
    def plain(self) -> str | None:
        """The text of a word without quotes and expansions, as reserved words are; None for any other."""
        if any(part.kind != "text" or part.quoted for part in self.parts):
            return None
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Assignment:
    """`NAME=value`, `NAME+=value` or an array.

    Args:
        name: The variable.
        value: A word, or the words of an array.
        adds: Whether it is appended to the value that is there.
        element: Whether it sets one element of an array.
    """

    name: str
    value: Source | tuple[Source, ...]
    adds: bool = False
    element: bool = False


@dataclass
class Command:
    """A simple command: assignments, then words.

    Args:
        assignments: Those before the first word.
        words: The program and its arguments.
    """

    assignments: list[Assignment] = field(default_factory=list[Assignment])
    words: list[Source] = field(default_factory=list[Source])


@dataclass
class Test:
    """`[[ ... ]]`.

    Args:
        tokens: Operands as words, and operators that are not quoted as strings.
    """

    tokens: list[Source | str]


@dataclass
class Chain:
    """`left && right` or `left || right`.

    Args:
        left: What runs first.
        operator: `&&` or `||`.
        right: What runs if the first one succeeds, or fails.
    """

    left: "Statement"
    operator: Literal["&&", "||"]
    right: "Statement"


@dataclass
class Pipeline:
    """Commands that run at once, each in a shell of its own; also a background job, and `! command`.

    Args:
        commands: The commands, in order.
        negated: Whether success and failure of the last one are exchanged.
    """

    commands: "list[Statement]"
    negated: bool = False


@dataclass
class If:
    """Conditions with their bodies.

    Args:
        branches: Pairs of a condition and what runs where it is the first one that holds.
        otherwise: What runs where none holds.
    """

    branches: "list[tuple[list[Statement], list[Statement]]]"
    otherwise: "list[Statement]"


@dataclass
class Loop:
    """A loop over words, or on a condition.

    Args:
        variable: The variable of a loop over words; None for one on a condition.
        words: The words; None where they are the arguments of the script.
        condition: The statements that decide about another round.
        body: What runs in each round.
        until: Whether the loop ends where the condition holds, instead of where it does not.
    """

    variable: str | None
    words: list[Source] | None
    condition: "list[Statement]"
    body: "list[Statement]"
    until: bool = False


@dataclass
class Case:
    """A word, and patterns with the bodies that they choose.

    Args:
        word: What is compared.
        branches: Pairs of patterns and what runs for the first one that matches.
        falls: Whether some branch ends with `;&` or `;;&`, after which others may run as well.
    """

    word: Source
    branches: "list[tuple[list[Source], list[Statement]]]"
    falls: bool = False


@dataclass
class Group:
    """Statements in braces or parentheses.

    Args:
        body: The statements.
        subshell: Whether it is in parentheses, so that what it sets ends with it.
    """

    body: "list[Statement]"
    subshell: bool


@dataclass
class Function:
    """The definition of a function.

    Args:
        name: What it is called by.
        body: What a call runs.
    """

    name: str
    body: "list[Statement]"


@dataclass
class Opaque:
    """What is not understood.

    Args:
        names: The names of variables in it, which it may change.
        line: The line on which it begins, from 1.
    """

    names: frozenset[str]
    line: int


Statement: TypeAlias = Command | Test | Chain | Pipeline | If | Loop | Case | Group | Function | Opaque


@dataclass
class Parsed:
    """A script.

    Args:
        statements: What it runs, in order.
        here: The delimiters of its here-documents, whose text is not read.
    """

    statements: list[Statement]
    here: list[str]


def parse(text: str) -> Parsed:
    """The statements of a script.

    Args:
        text: A script of a POSIX shell or of Bash.

    Raises:
        ValueError: If statements are nested too deeply.

    Examples:
        >>> [command] = parse("python -m train a.b=$N  # why").statements
        >>> [[part.text for part in word.parts] for word in command.words]
        [['python'], ['-m'], ['train'], ['a.b=', '$N']]
    """
    reader = _Reader(text)
    return Parsed(reader.script(), reader.here)


def parse_word(text: str) -> Source:
    """The word within an expansion, in which blanks and operators have no meaning.

    Args:
        text: The text, such as that after `:-`.
    """
    return _Reader(text).word(ends="")


def walk(statements: list[Statement]) -> Iterator[Statement]:
    """All statements, with those inside of others.

    Args:
        statements: Where to begin.
    """
    pending = list(reversed(statements))
    while pending:
        statement = pending.pop()
        yield statement
        pending += reversed(_inside(statement))


def _inside(statement: Statement) -> list[Statement]:
    match statement:
        case Chain():
            return [statement.left, statement.right]
        case Pipeline():
            return statement.commands
        case If():
            return [s for pair in statement.branches for part in pair for s in part] + statement.otherwise
        case Loop():
            return statement.condition + statement.body
        case Case():
            return [s for _, body in statement.branches for s in body]
        case Group() | Function():
            return statement.body
        case _:
            return []


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.here: list[str] = []
        self.pending: list[str] = []  # here-documents whose text begins after this line
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = max(self.at, self._counted)
        return self._line

    # ---- statements ----

    def script(self) -> list[Statement]:
        found: list[Statement] = []
        while True:
            found += self.statements(frozenset())
            if self.at >= len(self.text):
                return found
            self.at += 1  # a stray ) or a reserved word out of place
            found.append(Opaque(frozenset(), self.line))

    def statements(self, ends: frozenset[str]) -> list[Statement]:
        """Statements up to one of the reserved words, a closing parenthesis, or the end."""
        found: list[Statement] = []
        while True:
            self._skip_blank()
            while self.at < len(self.text) and self.text[self.at] in ";&|":  # separators
                if self.text.startswith((";;", ";&"), self.at) and "esac" in ends:
                    return found
                if self.text[self.at] == "&" and found:
                    found[-1] = Pipeline([found[-1]])
                self.at += 1
                self._skip_blank()
            if self.at >= len(self.text) or self.text[self.at] == ")" or self._reserved() in ends:
                return found
            before = self.at
            found.append(self._chain())
            if self.at == before:
                return found

    def _chain(self) -> Statement:
        left = self._pipeline()
        while self.text.startswith(("&&", "||"), self.at):
            operator: Literal["&&", "||"] = "&&" if self.text[self.at] == "&" else "||"
            self.at += 2
            self._skip_blank()
            left = Chain(left, operator, self._pipeline())
        return left

    def _pipeline(self) -> Statement:
        negated = False
        while self._reserved() == "!":
            negated = not negated
            self.at += 1
            self._skip_spaces()
        commands = [self._nested(self._command)]
        while self.text.startswith("|", self.at) and not self.text.startswith("||", self.at):
            self.at += 2 if self.text.startswith("|&", self.at) else 1
            self._skip_blank()
            commands.append(self._nested(self._command))
        return commands[0] if len(commands) == 1 and not negated else Pipeline(commands, negated)

    def _nested(self, read: Callable[[], Statement]) -> Statement:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"line {self.line}: more than {MAX_DEPTH} statements within each other")
        found = read()
        self.depth -= 1
        return found

    def _command(self) -> Statement:
        if self.text.startswith("((", self.at):
            return self._opaque_to("))")
        if self.text.startswith("(", self.at):
            self.at += 1
            body = self.statements(frozenset())
            self._closing_parenthesis()
            return self._redirected(Group(body, subshell=True))
        word = self._reserved()
        if word in ("if", "for", "select", "while", "until", "case", "{"):
            self.at += len(word)
            read = {"if": self._if, "case": self._case, "{": self._braces, "for": self._for, "select": self._for}
            found = read[word]() if word in read else self._while(until=word == "until")
            return self._redirected(found)
        if word == "[[":
            self.at += 2
            return self._redirected(self._test())
        if word == "function":
            self.at += len(word)
            self._skip_spaces()
            name = self.word().plain or ""
            return self._function(name)
        if word in RESERVED and word != "!":
            self.at += len(word or "")  # out of place
            return Opaque(frozenset(), self.line)
        return self._simple()

    def _if(self) -> Statement:
        branches: list[tuple[list[Statement], list[Statement]]] = []
        otherwise: list[Statement] = []
        while True:
            condition = self.statements(frozenset({"then", "fi"}))
            self._take("then")
            branches.append((condition, self.statements(frozenset({"elif", "else", "fi"}))))
            if not self._take("elif"):
                break
        if self._take("else"):
            otherwise = self.statements(frozenset({"fi"}))
        self._take("fi")
        return If(branches, otherwise)

    def _for(self) -> Statement:
        self._skip_spaces()
        if self.text.startswith("((", self.at):
            head = self._opaque_to("))")
            self._skip_blank()
            return Group([head, self._loop(Loop(None, None, [head], []))], subshell=False)
        name = _NAME.match(self.text, self.at)
        if name is None:
            return Opaque(frozenset(), self.line)
        self.at = name.end()
        self._skip_blank()
        words: list[Source] | None = None
        if self._take("in"):
            words = []
            while True:
                self._skip_spaces()
                if self.at >= len(self.text) or self.text[self.at] in "\n;&|()<>":
                    break
                words.append(self.word())
        self._skip_blank()
        if self.text.startswith(";", self.at):
            self.at += 1
        return self._loop(Loop(name[0], words, [], []))

    def _while(self, *, until: bool) -> Statement:
        return self._loop(Loop(None, None, self.statements(frozenset({"do", "done"})), [], until=until))

    def _loop(self, loop: Loop) -> Loop:
        self._skip_blank()
        self._take("do")
        loop.body = self.statements(frozenset({"done"}))
        self._take("done")
        return loop

    def _case(self) -> Statement:
        self._skip_spaces()
        found = Case(self.word(), [])
        self._skip_blank()
        self._take("in")
        while True:
            self._skip_blank()
            if self.at >= len(self.text) or self._take("esac"):
                return found
            if self.text.startswith("(", self.at):
                self.at += 1
            patterns: list[Source] = []
            while self.at < len(self.text) and self.text[self.at] not in ")\n;":
                self._skip_spaces()
                patterns.append(self.word())
                self._skip_spaces()
                if not self.text.startswith("|", self.at):
                    break
                self.at += 1
            self._closing_parenthesis()
            found.branches.append((patterns, self.statements(frozenset({"esac"}))))
            while self.text.startswith((";", "&"), self.at):
                found.falls |= self.text[self.at] == "&"
                self.at += 1

    def _braces(self) -> Statement:
        body = self.statements(frozenset({"}"}))
        self._take("}")
        return Group(body, subshell=False)

    def _function(self, name: str) -> Statement:
        self._skip_spaces()
        if self.text.startswith("(", self.at):
            self.at += 1
            self._closing_parenthesis()
        self._skip_blank()
        body = self._nested(self._command)
        return Function(name, body.body if isinstance(body, Group) and not body.subshell else [body])

    def _test(self) -> Statement:
        tokens: list[Source | str] = []
        while self.at < len(self.text):
            self._skip_blank()
            if self._reserved() == "]]":
                self.at += 2
                break
            operator = re.compile(r"&&|\|\||[()<>&|;]").match(self.text, self.at)
            if operator is not None:
                self.at = operator.end()
                tokens.append(operator[0])
            elif self.at < len(self.text):
                tokens.append(self.word())
        return Test(tokens)

    def _simple(self) -> Statement:
        found = Command()
        while self.at < len(self.text):
            self._skip_spaces()
            c = self.text[self.at : self.at + 1]
            if c == "" or c in "\n;|()" or (c == "&" and not self.text.startswith(("&>", "&<"), self.at)):
                break
            if c in "<>&":
                self._redirect()
                continue
            match = None if found.words else _ASSIGNMENT.match(self.text, self.at)
            if match is not None:
                found.assignments.append(self._assignment(match))
                continue
            word = self.word()
            if self.text[self.at : self.at + 1] in ("<", ">") and (word.plain or "").isdigit():
                continue  # the number of a redirected stream
            found.words.append(word)
            name = word.plain
            if len(found.words) == 1 and name and self._is_function_head():
                return self._function(name)
            declares = name is not None and found.words[0].plain in _DECLARING
            match = _ASSIGNMENT.match(self.text, self._after_spaces()) if declares else None
            if match is not None and self.text.startswith("(", match.end()):  # declare -a NAME=( ... )
                self._skip_spaces()
                found.assignments.append(self._assignment(match))
        return found

    def _is_function_head(self) -> bool:
        return re.compile(r"[ \t]*\([ \t]*\)").match(self.text, self.at) is not None

    def _assignment(self, match: re.Match[str]) -> Assignment:
        self.at = match.end()
        value: Source | tuple[Source, ...]
        if self.text.startswith("(", self.at):
            self.at += 1
            value = tuple(self._array())
        else:
            value = self.word()
        return Assignment(match[1], value, adds=bool(match[3]), element=match[2] is not None)

    def _array(self) -> list[Source]:
        words: list[Source] = []
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
                words.append(self.word())
        return words

    def _redirected(self, statement: Statement) -> Statement:
        while True:
            self._skip_spaces()
            number = re.compile(r"[0-9]*(?=[<>]|&>)").match(self.text, self.at)
            if number is None or self.at >= len(self.text):
                return statement
            self.at = number.end()
            self._redirect()

    def _redirect(self) -> None:
        match = _HERE.match(self.text, self.at)
        if match is not None:
            delimiter = match[match.lastindex or 0]
            self.pending.append(delimiter)
            self.here.append(delimiter)
            self.at = match.end()
            return
        match = _REDIRECT.match(self.text, self.at)
        self.at = self.at + 1 if match is None else match.end()
        if self.text[self.at : self.at + 1] not in ("", *_ENDS):
            self.word()
        elif self.text.startswith("(", self.at):  # <( ... ), the output of commands as a file
            self._skip_nested("(")

    def _opaque_to(self, end: str) -> Opaque:
        line, start = self.line, self.at
        found = self.text.find(end, self.at)
        self.at = len(self.text) if found < 0 else found + len(end)
        return Opaque(frozenset(_NAME.findall(self.text, start, min(self.at, start + 1000))), line)

    def _closing_parenthesis(self) -> None:
        self._skip_blank()
        if self.text.startswith(")", self.at):
            self.at += 1

    # ---- blanks and reserved words ----

    def _reserved(self) -> str | None:
        """The reserved word here, if there is one."""
        for word in _FIRST.get(self.text[self.at : self.at + 1], ()):
            after = self.at + len(word)
            if self.text.startswith(word, self.at) and self.text[after : after + 1] in ("", *_ENDS):
                return word
        return None

    def _take(self, word: str) -> bool:
        self._skip_blank()
        if self._reserved() != word:
            return False
        self.at += len(word)
        return True

    def _after_spaces(self) -> int:
        at = self.at
        while at < len(self.text) and self.text[at] in _BLANK:
            at += 1
        return at

    def _skip_spaces(self) -> None:
        """Skip blanks and joined lines, and a comment where one begins."""
        text = self.text
        while self.at < len(text):
            if text[self.at] in _BLANK:
                self.at += 1
            elif text.startswith("\\\n", self.at) or text.startswith("\\\r\n", self.at):
                self.at = text.index("\n", self.at) + 1
            elif text[self.at] == "#":
                self._skip_comment()
            else:
                return

    def _skip_blank(self) -> None:
        """Skip blanks, comments and ends of lines, and the here-documents that begin after them."""
        while True:
            self._skip_spaces()
            if not self.text.startswith("\n", self.at):
                return
            self.at += 1
            self._skip_here()

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
        self.at = min(self.at, len(self.text))
        self.pending = []

    # ---- words ----

    def word(self, ends: str = _ENDS) -> Source:
        text, parts, line = self.text, list[Part](), self.line
        while self.at < len(text) and text[self.at] not in ends:
            c = text[self.at]
            if c == "\\":
                if text.startswith("\\\n", self.at):
                    self.at += 2
                    continue
                parts.append(Part("text", text[self.at + 1 : self.at + 2], quoted=True))
                self.at += 2
            elif c == "'":
                end = text.find("'", self.at + 1)
                end = len(text) if end < 0 else end
                parts.append(Part("text", text[self.at + 1 : end], quoted=True))
                self.at = end + 1
            elif c == '"':
                self._double_quoted(parts)
            elif c == "$" and text.startswith(("$'", '$"'), self.at):
                start = self.at
                self.at += 1
                self._skip_quoted(text[self.at])
                parts.append(Part("unknown", text[start : self.at], quoted=True))
            elif c in "$`":
                parts.append(self._expansion(quoted=False))
            else:
                end = self.at + 1
                while end < len(text) and text[end] not in ends and text[end] not in "\\'\"$`":
                    end += 1
                parts.append(Part("text", text[self.at : end], quoted=False))
                self.at = end
        return Source(tuple(parts), line)

    def _skip_quoted(self, quote: str) -> None:
        self.at += 1
        while self.at < len(self.text) and self.text[self.at] != quote:
            self.at += 2 if self.text[self.at] == "\\" else 1
        self.at = min(self.at + 1, len(self.text))

    def _double_quoted(self, parts: list[Part]) -> None:
        text = self.text
        self.at += 1
        parts.append(Part("text", "", quoted=True))  # "" is a word
        while self.at < len(text):
            c = text[self.at]
            if c == '"':
                self.at += 1
                return
            if c == "\\":
                if not text.startswith("\\\n", self.at):
                    escaped = text[self.at + 1 : self.at + 2]
                    parts.append(Part("text", escaped if escaped in '"\\$`' else c + escaped, quoted=True))
                self.at += 2
            elif c in "$`":
                parts.append(self._expansion(quoted=True))
            else:
                end = self.at + 1
                while end < len(text) and text[end] not in '"\\$`':
                    end += 1
                parts.append(Part("text", text[self.at : end], quoted=True))
                self.at = end

    def _expansion(self, *, quoted: bool) -> Part:
        text: str = self.text
        start: int = self.at
        hydra = _HYDRA.match(text, start)
        if hydra is not None:
            self.at = hydra.end()
            return Part("text", hydra[0], quoted=True)
        variable = _VARIABLE.match(text, start)
        kind: Kind = "unknown"
        if variable is not None:
            self.at, kind = variable.end(), "variable"
        elif text[start] == "`" or text[start + 1 : start + 2] in ("(", "{"):
            self._skip_nested(text[start])
            if text.startswith("$((", start) and text.startswith("))", self.at - 2):
                kind = "arithmetic"
            elif text.startswith("${", start) and text[self.at - 1] == "}":
                kind = "variable"
        elif text.startswith("$[", start):  # arithmetic of old
            end = text.find("]", start)
            self.at = len(text) if end < 0 else end + 1
        else:
            self.at += 1
            return Part("text", "$", quoted=quoted)  # a dollar sign that begins no expansion
        return Part(kind, text[start : self.at], quoted)

    def _skip_nested(self, first: str) -> None:
        """Skip to the end of ${...}, $(...), $((...)), (...) or backticks, with all that is nested and quoted in them."""
        text, closing = self.text, list[str]()
        if first == "(":
            closing.append(")")
            self.at += 1
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
            elif c == "$" and text[self.at + 1 : self.at + 2] in ("(", "{"):
                self.at += 1
                closing.append(_CLOSING[text[self.at]])
            elif c == "`" or (c == '"' and not quoted) or (c == "'" and not quoted):
                closing.append(c)
            elif c == "(" and closing and closing[-1] == ")":
                closing.append(")")
            self.at += 1
        self.at = len(text)


_DECLARING = ("export", "declare", "local", "readonly", "typeset")
_FIRST: dict[str, list[str]] = {}
for _reserved_word in (*RESERVED, "]]"):
    _FIRST.setdefault(_reserved_word[0], []).append(_reserved_word)


def may_be_braces(source: Source) -> bool:
    """Whether Bash would make several words from braces in it, `{a,b}` or `{1..3}`.

    Args:
        source: A word of a command.
    """
    shown = "".join(part.text if part.kind == "text" and not part.quoted else "x" for part in source.parts)
    return _BRACES.search(shown) is not None
