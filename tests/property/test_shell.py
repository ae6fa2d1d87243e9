"""The doctor's reading of scripts beside Bash itself, on generated scripts whose only command is a function that prints.

Bash runs with an empty environment, restricted, without a program on its PATH and in an empty folder.
"""

import re
import shutil
import subprocess

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bandpo.doctor.shell import Word, read_script

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="there is no Bash on this machine to compare with")
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
        formula = "&& E))" in script and re.search(r"\bE\+?=.", script.removeprefix(FIRST))  # a name for another formula
        assert UNKNOWN in script or unset or formula, script
        assert all(any(fits(command, line) for command in ours) for line in theirs), (script, ours, theirs)
    else:
        assert [[word.text for word in command] for command in ours] == theirs, script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@example(script='run "${R[@]}" $B "$B" ${B} x$((N*2))')
@example(script='C="\n p.q=$A \\\n r.s=2"\nrun $C')
@example(script="for V in 1 2; do\n  [ $V = 2 ] && continue\n  run $V\ndone")
@example(script='if [ -z "$1" ]; then\n  N=4\nelse\n  N=$1\nfi\nrun $N "$@"')
@given(script=scripts)
def test_words_are_those_of_bash(script, folder):
    check(FIRST + script, folder)


def test_the_comparison_can_fail(folder):
    assert fits([Word("a", 1)], ["a"]) and not fits([Word("a", 1)], ["b"]) and not fits([Word("a=", 2)], ["a=1"])
    assert fits([Word("a=$X", 2)], ["a=1"]) and not fits([Word("a=$X", 2)], ["b=1"])
    assert of_bash("run a 'b c'", folder) == [["a", "b c"]]


ONCE_MISREAD = [
    "f() { run ${N:-8}; }\nN=4 f; run ${N:-8}",
    'X=foobar\nif [[ "$X" == *"oba"* ]]; then B=1; else B=2; fi\nrun $B',
    'X=foobar\ncase $X in "foo"*) B=1 ;; *) B=2 ;; esac\nrun $B',
    'X=foo; P="f*"\n[[ $X == "$P"* ]] && B=1 || B=2\n[[ $X == $P ]] && C=1 || C=2\nrun $B $C',
    "case a in a) run 1 ;& b) run 2 ;; c) run 3 ;; esac",
    "N=4\n: $((N += 1))\nrun $N",
    "N=4\nrun $((N++)) $N",
    "N=1\nfor i in 1 2 3 $(date); do M=$((N *= 2)); done\nrun $N",
    "X=$(false) && B=1 || B=2\nrun $B",
    "if X=`false`; then B=1; else B=2; fi\nrun $B",
    "IFS=,\nX=a,b\nrun $X",
    'IFS=,\nX=(a b)\nrun "${X[*]}" "${X[@]}"',
    "f() { local IFS=,; X='a b'; run $X; }\nf",
    "declare -i N=2+3 M=4\nrun $N $M\nN=1+1\nrun $N",
    "declare -l N=ABC\nrun $N",
    "x=1\ndeclare -n r=x\nr=5\nrun $x",
    "A=([2]=x y)\nrun ${A[0]} ${A[*]}",
    "cat <<\\EOF\nrun 1\nEOF\nrun 2",
    "cat <<'END OF.IT'\nrun 1\nEND OF.IT\nrun 2",
    "run $[2+3]",
    'A=(1 2)\nrun $A "$A"\nA=3\nrun "${A[@]}"',
    "A=(1 2)\nunset 'A[0]'\nrun \"${A[@]}\"",
    'f() { local -a A=(1 2); run "${A[@]}"; }\nf\nrun "${A[@]}"',
    "f() { readonly X=1; }\nX=0\nf\nrun $X",
    "N=1\nN=2 eval 'run $N'\nrun $N",
    "N=1\nset -- -a\nrun $# $1",
    "B='x y'\nexport A=$B\nrun $A\ndeclare C=$B D=\"$B\"z\nrun $C $D\n\"export\" E=$B\nrun $E",
    "export A={a,b} B=~ C=x:~\nrun $A\nrun $B\nrun $C\nrun a=~ a.b=~ a=b:~",
    "f() { continue; X=2; }\nfor i in 1 2; do f; break; done\nrun $X",
    'E=\nrun "$E""$@"\nrun "$E$@"\nrun """$@"\nrun "$@"""\nrun "$@$E"\nrun "x$@" "$@y"\nrun "$E""$E$@"',
]


@pytest.mark.parametrize("script", ONCE_MISREAD)
def test_what_was_once_misread(script, folder):
    theirs, found = of_bash(script, folder), read_script(script)
    ours = [command[1:] for command in found.commands if command[0].text == "run"]
    assert theirs
    if found.uncertain or found.opened:
        assert all(any(fits(command, line) for command in ours) for line in theirs), (ours, theirs)
    else:
        assert len(ours) == len(theirs) and all(map(fits, ours, theirs)), (ours, theirs)


@pytest.mark.parametrize(
    ("before", "given"),
    [
        ("", "env N=3"), ("set -a; N=3;", ""), ("set -o allexport; N=3; set +a;", ""), ("declare -x N=3;", ""),
        ("N=3;", ""), ("N=3; export N; export -n N;", ""), ("export N=3; N=2;", ""), ("", "N=3"), ("set -- -a; N=3;", ""),
    ],
)  # fmt: skip
def test_an_inner_shell_has_the_variables_of_bash(before, given):
    script = f"{before} {given} bash -c 'echo ${{N:-4}}'"
    done = subprocess.run([str(BASH), "-c", script], capture_output=True, check=True, env={"PATH": "/usr/bin:/bin"})
    [words] = [command[1:] for command in read_script(script).commands if command[0].text == "echo"]
    assert [word.text for word in words if word.literal] == done.stdout.decode().split()


def test_a_count_of_arguments_is_listed():
    assert "@" in read_script("B=1\nif [ $# -gt 0 ]; then B=2; fi\nrun $B").assumed
    assert "@" not in read_script("f() { run $#; }\nf").assumed
