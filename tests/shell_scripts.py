"""Generated scripts whose only command is a function that prints, and what Bash gives it; for the tests and for `make fuzz`.

Bash runs with an empty environment, restricted, without a program on its PATH and in an empty folder.
"""

import re
import shutil
import subprocess

from hypothesis import strategies as st

from bandpo.doctor.shell import Word, read_script

BASH = shutil.which("bash")
PRINTS = 'run() { [ $# -eq 0 ] || printf "%s\\0" "$@"; printf "\\n\\0"; }\n'
FIRST = "A=a.b=1\nB='x y'\nN=7\nR=(r1 'r 2' \"$A\")\nE=\nF=f\nV=v\n"

plain = st.text("abc012.=/:,_-", min_size=1, max_size=4)
names = st.sampled_from(["A", "B", "N", "E", "F", "V"])
texts = st.sampled_from(["A", "B", "E", "F"])  # N is a number
simple = st.one_of(
    names.map(lambda n: f"${n}"),
    names.map(lambda n: f"${{{n}}}"),
    st.tuples(names, st.sampled_from([":-", "-", ":+", "+"]), plain).map(lambda t: f"${{{t[0]}{t[1]}{t[2]}}}"),
    st.tuples(names, st.sampled_from(["%b*", "%%=*", "#a", "##*.", "#*=", ":1", ":1:2"])).map(
        lambda t: f"${{{t[0]}{t[1]}}}"
    ),
    st.tuples(names, names).map(lambda t: f"${{{t[0]}:-${t[1]}}}"),
    st.sampled_from(["${#A}", "${#R[@]}", "${R[1]}", "$#", "${1:-one}", "$1", "${F:=set}"]),
    st.tuples(st.integers(0, 20), st.sampled_from("+-*/%<")).map(lambda t: f"$((N {t[1]} ({t[0]} + 1)))"),
    st.sampled_from(["$(( -N / 2 ))", "$((2 ** 3 ** 1))", "$((N == 7 && E))", "$(($N * ${N}))", "$((-N % 3))"]),
)
inside = st.lists(st.one_of(plain, simple, st.just(" ")), max_size=3).map("".join)
piece = st.one_of(
    plain,
    simple,
    inside.map(lambda s: f'"{s}"'),
    st.text("ab $\\=", max_size=4).map(lambda s: f"'{s}'"),
    st.sampled_from(["\\ ", "\\$A", '"a\\"b"', '"\'"', '"${R[@]}"', "${R[*]}", '"$@"', "$*", '"${@:2}"', "*x", "{}"]),
)
word = st.lists(piece, min_size=1, max_size=3).map("".join)
words = st.lists(word, max_size=3).map(" ".join)
value = st.one_of(word, inside.map(lambda s: f'"{s}"'))
UNKNOWN = "[ -e /proc ]"
condition = st.one_of(
    st.tuples(names, plain).map(lambda t: f'[ "${t[0]}" = "{t[1]}" ]'),
    names.map(lambda n: f'[ -z "${n}" ]'),
    names.map(lambda n: f"[[ ${n} == a* ]]"),
    st.tuples(names, names).map(lambda t: f"[[ -n ${t[0]} && ${t[1]} != 7 ]]"),
    st.integers(5, 9).map(lambda i: f"[ 7 -gt {i} ]"),
    st.sampled_from(["true", "false", "! false", UNKNOWN, f"! {UNKNOWN}", "[ $# -gt 0 ]"]),
)


def compound(body):
    several = st.lists(body, min_size=1, max_size=3).map("\n".join)
    return st.one_of(
        st.tuples(condition, several, several).map(lambda t: f"if {t[0]}; then\n{t[1]}\nelse\n{t[2]}\nfi"),
        st.tuples(condition, several, condition, several).map(
            lambda t: f"if {t[0]}\nthen {t[1]}\nelif {t[2]}; then {t[3]}\nfi"
        ),
        st.tuples(condition, st.sampled_from(["&&", "||"]), body).map(lambda t: f"{t[0]} {t[1]} {{ {t[2]}\n}}"),
        st.tuples(words, several).map(lambda t: f"for V in {t[0]}; do\n{t[1]}\ndone"),
        st.tuples(names, plain, several, several).map(
            lambda t: f"case ${t[0]} in\n  {t[1]}) {t[2]} ;;\n  a*|'x y') {t[3]} ;;\n  *) run other ;;\nesac"
        ),
        several.map(lambda s: f"( {s}\n)"),
        several.map(lambda s: f"{{ {s}\n}}"),
        st.tuples(several, words).map(lambda t: f"f() {{\nlocal A=in\n{t[0]}\n}}\nf {t[1]}\nrun after $A"),
        several.map(lambda s: f"while false; do\n{s}\ndone"),
    )


leaf = st.one_of(
    words.map(lambda w: f"run {w}"),
    st.tuples(texts, st.sampled_from(["=", "+="]), value).map("".join),
    st.tuples(texts, value).map(lambda t: f"export {t[0]}={t[1]}"),
    words.map(lambda w: f"R=({w})"),
    words.map(lambda w: f"R+=({w})"),
    st.tuples(texts, plain, words).map(lambda t: f"{t[0]}={t[1]} run {t[2]}"),
    st.integers(0, 99).map(lambda i: f"N={i}"),
    words.map(lambda w: f"set -- {w}"),
    st.tuples(condition, st.sampled_from(["continue", "break", "return 0", "exit 3"])).map(
        lambda t: f"if {t[0]}; then {t[1]}; fi"
    ),
    st.sampled_from(["run # no comment", "run \\\n  joined", "unset F", "run 2>&1 a", "set -euo pipefail; set +eu"]),
)
statement = st.recursive(leaf, compound, max_leaves=6)
scripts = st.lists(statement, min_size=1, max_size=5).map("\n".join)


def of_bash(script: str, folder) -> list[list[str]] | None:
    """What `run` was given, each time; None where Bash refuses the script."""
    text = PRINTS + script
    done = subprocess.run(
        [str(BASH), "--noprofile", "--norc", "-r", "-c", text], cwd=folder, timeout=20,
        env={"PATH": "/nowhere"}, capture_output=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if any(what in done.stderr for what in (b"syntax error", b"unexpected EOF", b"division by 0", b"error token")):
        return None
    return [line.split("\0")[:-1] for line in done.stdout.decode().split("\n\0")[:-1]]


def fits(ours: list[Word], theirs: list[str]) -> bool:
    if all(word.literal for word in ours):
        return [word.text for word in ours] == theirs
    for i, mine in enumerate(ours):
        if not mine.literal:  # it may be several words, or none
            return not mine.known or (i < len(theirs) and theirs[i].startswith(mine.text[: mine.known]))
        if i >= len(theirs) or mine.text != theirs[i]:
            return False
    return len(ours) == len(theirs)


def check(script: str, folder) -> None:
    theirs = of_bash(script, folder)
    if theirs is None:
        return
    found = read_script(script)
    ours = [command[1:] for command in found.commands if command[0].text == "run"]
    if found.uncertain or not all(word.literal for command in ours for word in command):
        unset = re.search(r"\$[A-Z]\w|\$\{?[1@*#]|unset", script)  # the environment or the arguments may have it
        formula = "&& E))" in script and re.search(
            r"\bE\+?=.", script.removeprefix(FIRST)
        )  # a name for another formula
        assert UNKNOWN in script or unset or formula, script
        assert all(any(fits(command, line) for command in ours) for line in theirs), (script, ours, theirs)
    else:
        assert [[word.text for word in command] for command in ours] == theirs, script
