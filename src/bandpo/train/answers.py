r"""The part of a text that is its mathematical answer, written as LaTeX; None for what cannot be read.

math-verify finds expressions anywhere in a text: for the reference `2\sqrt{3}` it gives 2, and for a box that was cut off it
gives the box before it. Here a reference is read as a whole, and the answer of a completion is the content of its last box.
"""

import math
import numbers
import re
import unicodedata
from fractions import Fraction
from typing import Any

_BOX = re.compile(r"\\boxed(?![A-Za-z])\s*")
_CUT_COMMAND = re.compile(r"\\b(o(x(ed?)?)?)?\s*$")
_JOINED = re.compile(r"(\s|\$|,|;|\\[,;: ]|\\\]|\\\[|\\\)|\\\(|and|or|\\text\{\s*(and|or)\s*\}|\\quad)*")

_NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?\s*(\\?%)?")
_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d*)?)[eE]([+-]?\d+)")
_BASED = re.compile(r"([0-9A-F]+)_\{?(\d{1,2})\}?")
_PREFIXED = re.compile(r"0[xX][0-9A-Fa-f]+|0[bB][01]+|0[oO][0-7]+")
_MIXED = re.compile(r"([+-]?\d+) (\d+)/(\d+)")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\overline\{(\d+)\}(?!\d)")
_UNIT = re.compile(
    r"(?<=\d) ?(in|(?:[kcm]?m|mi|ft|in|[km]?g|m?[lL]|mol|[kM]?[JW])"
    r"/(?:s|h|hr|min|day|[km]?g|[kcm]?m|m?[lL]|mol)(?:\^\{?[23]\}?)?)$"
)
_CHOICE = re.compile(
    r"(?:\\(?:text\w*|mathrm|mathbf)\s*\{\s*)?\([A-H]\)\s*\}?[\s~]*(?:[-+.]?\d|\\?\$|\\[dt]?frac|\\sqrt)"
)
_ROOT = re.compile(r"√\s*(\d+|[A-Za-z]|\([^()]*\)|\{[^{}]*\})")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_LAST_LETTERS = re.compile(r"(?<=[\d}\s])(?<!\\)([A-Za-z]{1,3})(\}?\$?)$")
_MEASURED = re.compile(r"[$\\boxed{]*[+-]?[\d.,/]+(?:\s+[A-Za-z]+|[kcm]m|[km]g|m[lL]|ft|lbs?|hrs?|min|yr)\}?\$?")
_SPACED = re.compile(r"[+-]?\d{1,3}( \d{3})+(\.\d+)?")
_DIGIT_GROUP = re.compile(r"(?<=\d)(?:\\[,!:; ]|\{,\})(?=\d{3}(?!\d))")
_MONEY = re.compile(r"^\\?[$€£¥]\s*(?=[\d.])|(?<=\d)\s*\\?[$€£¥]$")
_AFTER_HASHES = re.compile(r"####\s*([^\n]+)")
_ANSWER = re.compile(
    r"\banswer\b[\s*_]*(?:is|=|:)[\s*_:]*(?:(?:therefore|thus|then|simply|just)\b)?[\s*_:,]*", re.IGNORECASE
)
_TAIL = 20_000  # characters at the end of a completion in which an answer without a mark is looked for
_LONGEST = 500  # characters of an answer that is stated in a sentence
_DISPLAY = re.compile(r"(?:\\\[|\$\$)\s*(.+?)\s*(?:\\\]|\$\$)", re.DOTALL)  # mathematics on lines of its own
_MARKED = re.compile(r"\banswer\b[^\n]{0,200}?(?<!\\)\$([^$\n]{1,300})(?<!\\)\$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[()\[\]{}]|\.(?!\d)|[,;](?=\s)|\n")
_MATHS_MARK = re.compile(r"\\[()\[\]]|(?<!\\)\$")
_BOLD = re.compile(r"\*\*([^*\n]{0,200}\d[^*\n]{0,200})\*\*")
_IN_MATHS = re.compile(r"(?:(?<!\\)\${1,2}|\\[(\[])\s{0,9}([^$\n]{1,300}?)\s{0,9}(?:(?<!\\)\$|\\[)\]])")
_ANY_NUMBER = re.compile(r"(?<![\w.])[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?(?![\w])")
_PREFIX = re.compile(r"^(the\s+)?(final\s+)?answer(\s+is)?\s*[:=]?\s*", re.IGNORECASE)
_ANCHOR = re.compile(r"(?<!\\)\\[(\[]")
_DOLLAR = re.compile(r"(?<!\\)\$")
_UNIT_BEFORE_DIGIT = re.compile(
    r"[\d}]\s*(\\[,;: ]|~)?\s*\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*[A-Za-z][^{}]*\}(?!\s*\^(\d|\{\d\})$).*\d"
)
_AND = re.compile(r"\\(?:text\w*|mbox|mathrm)\s*\{\s*,?\s*(and|or)\s*\}", re.IGNORECASE)
_SYMBOLS = {
    "−": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "°": r"^\circ ",
}  # fmt: skip
_FUNCTION = re.compile(r"(?<![A-Za-z\\_])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|pi)(?![A-Za-z])")
_WORD = r"(?:[A-Za-z]{4,}|[A-Z][a-z]{2,}|yes|no|odd|one|two|six|ten)(?![A-Za-z])"
_TEXT = re.compile(
    r"(?P<keep>\\(?:text\w*|mbox|math\w+|operatorname\*?|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|_\{[^{}]*\}|(?:sqrt|infinity|percent(?:age)?|frac)"
    rf"(?![A-Za-z]))|(?<![A-Za-z\\_])(?P<words>{_WORD}(?:(?:\s+|-|')(?!and\b|or\b)[A-Za-z]+(?![A-Za-z]))*)"
)


def boxed_answer(completion: str) -> str | None:
    r"""The content of the last box in a completion as LaTeX, or the text itself if it has no box.

    Boxes with nothing but commas or "and" between them are one answer of several parts.

    Args:
        completion: Text of the completion.

    Returns:
        LaTeX; None if the last box is empty or was cut off, also in the middle of the command: then there is no answer.

    Examples:
        >>> boxed_answer(r"\boxed{12}. Hmm, so \boxed{13}.")
        '\\boxed{13}'
        >>> boxed_answer(r"\boxed{12}. Hmm, wait. \boxed{") is None
        True
    """
    parts: list[str] = []
    end = 0
    for start in _BOX.finditer(completion):
        if start.start() < end:  # a box within a box
            continue
        close = _closing_brace(completion, start.end())
        if close is None:
            return None
        if _JOINED.fullmatch(completion, end, start.start()) is None:
            parts = []
        parts.append(completion[start.end() + 1 : close].strip())
        end = close + 1
    if not parts:
        return completion
    if not parts[-1] or _CUT_COMMAND.search(completion, end):
        return None
    read = [as_latex(part) for part in parts if part]
    return None if None in read else rf"\boxed{{{', '.join(part for part in read if part)}}}"


def stated_answer(completion: str) -> str | None:
    r"""The answer that a completion states, also without a box: the lenient reading.

    A box counts as in `boxed_answer`. Without one it is the first of these that the text has:

    * what follows the last `####`;
    * what follows the last "answer is", "answer:" or "answer =": `\[...\]` or `$$...$$`, else up to the end of the clause;
    * the last text in bold, `**...**`, with a number in it;
    * the last mathematics in `$...$`, `\(...\)` or `\[...\]`;
    * the last number.

    Args:
        completion: Text of the completion.

    Returns:
        LaTeX in a box; None if the text states no answer, or its box was cut off.

    Examples:
        >>> stated_answer("So the answer is 73."), stated_answer("**73**"), stated_answer("7 x 9 = 63, and then 73")
        ('\\boxed{73}', '\\boxed{73}', '\\boxed{73}')
        >>> stated_answer(r"\boxed{12}. Hmm, wait. \boxed{") is None
        True
    """
    if _BOX.search(completion) or _CUT_COMMAND.search(completion):
        return boxed_answer(completion)
    marks = list(_ANSWER.finditer(completion))
    if (found := _AFTER_HASHES.findall(completion)) or (
        found := [_sentence(completion[m.end() :]) for m in marks[-1:]]
    ):
        stated = found[-1]
    else:
        end = completion[-_TAIL:]
        stated = next((all_[-1] for p in (_BOLD, _IN_MATHS, _ANY_NUMBER) if (all_ := p.findall(end))), "")
    latex = as_latex(_MATHS_MARK.sub("", stated).strip("*_` "))
    return rf"\boxed{{{latex}}}" if latex else None


def marked_answer(completion: str) -> str | None:
    r"""The answer that a completion marks as one: its last box, or without a box the last `$...$` behind the word "answer".

    Args:
        completion: Text of the completion.

    Returns:
        LaTeX in a box; None if nothing is marked, or the last box was cut off.

    Examples:
        >>> marked_answer(r"It is \boxed{12}."), marked_answer("The answer is $7$."), marked_answer("The answer is 7.")
        ('\\boxed{12}', '\\boxed{7}', None)
    """
    if _BOX.search(completion) or _CUT_COMMAND.search(completion):
        found = boxed_answer(completion)
        return None if found == completion and not _BOX.match(completion) else found
    marks = _MARKED.findall(completion[-_TAIL:])
    latex = as_latex(marks[-1]) if marks else None
    return rf"\boxed{{{latex}}}" if latex else None


def _sentence(text: str) -> str:
    """The text up to the end of its sentence or clause; brackets keep together what is in them."""
    text, depth = text[:_LONGEST], 0
    if display := _DISPLAY.match(text):
        return display[1]
    for mark in _SENTENCE_END.finditer(text):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] in ")]}":
            depth -= 1
        elif mark[0] == "\n" or depth <= 0:
            return text[: mark.start()]
    return text


def _closing_brace(text: str, opening: int) -> int | None:
    """The position of the brace that closes the group, None if there is none; escaped braces count as characters."""
    if not text.startswith("{", opening):
        return None
    depth, i = 0, opening
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return None


def reference(answer: Any) -> str | None:
    r"""A reference answer in a form whose anchors math-verify finds, `$...$` or `\boxed{...}`.

    In a text with a box, or with mathematics in `$...$`, `\(...\)` or `\[...\]`, that part holds the answer; in a text with
    `####` (GSM8K) the answer follows it. Any other text is the answer as a whole.

    Args:
        answer: Reference answer, text or a number.

    Returns:
        LaTeX; None if the answer is of another type, is not finite, or is prose.

    Examples:
        >>> reference(r"2\sqrt{3}"), reference("48 / 2 = 24\n#### 24"), reference(1450)
        ('$2\\sqrt{3}$', '$24$', '$1450$')
    """
    if isinstance(answer, numbers.Real) and not isinstance(answer, bool):
        if not math.isfinite(answer):
            return None
        answer = str(answer)
    if not isinstance(answer, str | bool):
        return None
    text = str(answer).rpartition("####")[2].strip()
    if _BOX.search(text):
        return boxed_answer(text)
    text = _PREFIX.sub("", _MONEY.sub("", text))
    dollars = len(_DOLLAR.findall(text))
    if _ANCHOR.search(text) or (dollars and dollars % 2 == 0):
        return text
    if _CHOICE.match(text):  # the letter, or the value behind it?
        return None
    latex = as_latex(_DOLLAR.sub("", text))
    return f"${latex}$" if latex else None


def is_plain_number(answer: Any) -> bool:
    """Whether a reference is only a number in digits, so that it is readable without asking a parser.

    Args:
        answer: Reference answer of any type.
    """
    if isinstance(answer, int):
        return not isinstance(answer, bool)
    return isinstance(answer, str) and _NUMBER.fullmatch(answer.rpartition("####")[2].strip()) is not None


def as_latex(text: str) -> str | None:
    r"""An answer as LaTeX that math-verify reads as a whole.

    Marks between thousands are removed, `1.5e-3` is written with a power of ten, `101_2` is converted to a decimal number,
    plain words become `\text{...}`, and plain names of functions become commands.

    Args:
        text: An answer without other text.

    Returns:
        LaTeX; None for prose, a duration or the like, from which math-verify would take only the first number.

    Examples:
        >>> as_latex("18 dollars"), as_latex("5 pi"), as_latex("6.02e23"), as_latex(r"100\,000")
        ('18\\text{ dollars}', '5 \\pi ', '6.02\\times 10^{23}', '100000')
        >>> as_latex("3 hours 20 minutes") is None
        True
    """
    text = re.sub(r"(?<![\\.])[.,;]$", "", text.strip()).strip()
    text = _MONEY.sub("", text)
    text = text.replace(r"\varnothing", r"\emptyset ")
    if not text.isascii():
        text = _without_unicode(text)
    if _PREFIXED.fullmatch(text):
        return str(int(text, 0))
    if found := _MIXED.fullmatch(text):
        return rf"{found[1]}\frac{{{found[2]}}}{{{found[3]}}}"
    text = _UNIT.sub(r"\\text{ \1}", _REPEATING.sub(_fraction, text))
    text = _both_signs(text)
    if found := _SCIENTIFIC.fullmatch(text):
        return rf"{found[1]}\times 10^{{{int(found[2])}}}"
    if _SPACED.fullmatch(text):
        return text.replace(" ", "")
    if (found := _BASED.fullmatch(text)) and 2 <= int(found[2]) <= 16 and int(max(found[1]), 16) < int(found[2]):
        return str(int(found[1], int(found[2])))
    text = _FUNCTION.sub(r"\\\1 ", _DIGIT_GROUP.sub("", text))
    words = [m for m in _TEXT.finditer(text) if m["words"]]
    mixed = re.search(r"\d", text) is not None
    if mixed and any(len(m["words"].split()) > 1 or len(words) > 1 for m in words) and words[0].end() < len(text):
        return None
    text = _TEXT.sub(lambda m: m["keep"] or rf"\text{{{' ' if mixed else ''}{m['words']}}}", text)
    text = re.sub(r"(?<=\d) (?=\\text\{ )", "", text)
    return None if _UNIT_BEFORE_DIGIT.search(_AND.sub(",", text)) else text


def with_variables(latex: str) -> str:
    r"""Put the last letters of an answer in braces where they are variables: else math-verify takes $6m$ for 6 with a unit.

    Args:
        latex: Answer in `$...$` or in a box.

    Returns:
        The answer, with these letters in braces.

    Examples:
        >>> with_variables(r"$2\pi h$"), with_variables(r"\boxed{6ab}"), with_variables("$5 m$"), with_variables("$5cm$")
        ('$2\\pi {h}$', '\\boxed{6{ab}}', '$5 m$', '$5cm$')
    """
    return latex if _MEASURED.fullmatch(latex) else _LAST_LETTERS.sub(r"{\1}\2", latex)


def _without_unicode(text: str) -> str:
    """Replace mathematical characters by their commands."""
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1].strip('(){}')}}}", text)
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0]).replace('−', '-')}}}", text)
    text = _VULGAR.sub(lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
    for symbol, command in _SYMBOLS.items():
        text = text.replace(symbol, command)
    return text


def _fraction(decimal: re.Match[str]) -> str:
    """A repeating decimal as a fraction."""
    whole, fixed, period = decimal.groups()
    scale = 10 ** len(fixed)
    value = Fraction(int((whole + fixed) or 0), scale) + Fraction(int(period), scale * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _both_signs(text: str) -> str:
    r"""An answer whose only `\pm` is inside a group as two answers; math-verify itself reads the other cases."""
    before, sign, after = text.partition(r"\pm")
    inside = len(re.findall(r"(?<!\\)\{", before)) > len(re.findall(r"(?<!\\)\}", before))
    if not sign or not inside or r"\pm" in after or r"\mp" in text or after[:1].isalpha():
        return text
    return f"{before}+{after}, {before}-{after}"
