"""The doctor's reading of scripts beside Bash itself (tests/shell_scripts.py)."""

import subprocess

import pytest
from hypothesis import HealthCheck, example, given, settings

from bandpo.doctor.shell import Word, read_script
from shell_scripts import BASH, FIRST, check, fits, of_bash, scripts

pytestmark = pytest.mark.skipif(BASH is None, reason="there is no Bash on this machine to compare with")


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
    'B=\'x y\'\nexport A=$B\nrun $A\ndeclare C=$B D="$B"z\nrun $C $D\n"export" E=$B\nrun $E',
    "export A={a,b} B=~ C=x:~\nrun $A\nrun $B\nrun $C\nrun a=~ a.b=~ a=b:~",
    "f() { continue; X=2; }\nfor i in 1 2; do f; break; done\nrun $X",
    "for V in 0 1; do\n( continue; run in )\nrun after\ndone",
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


def test_a_script_that_stops_without_the_environment_is_read_as_if_it_had_one():
    found = read_script('if [ -z "$HERE" ]; then\n  echo "set HERE"\n  exit 1\nfi\npython a.py --n 3 --save $HERE/x')
    [run] = [c for c in found.commands if c[0].text == "python"]
    assert [(w.text, w.literal) for w in run[2:4]] == [("--n", True), ("3", True)] and not run[5].literal
    assert "HERE" not in found.assumed and found.uncertain


def test_an_array_with_an_element_that_is_not_known():
    found = read_script('A=(--a $HERE/x --n 8)\nA+=(--m 9)\nrun "${A[@]}" --z\nrun ${A[1]} ${#A[@]} "${A[@]:2}"')
    assert [w.text for w in found.commands[0][1:]] == ["--a", "$HERE/x", "--n", "8", "--m", "9", "--z"]
    assert not any(w.literal for w in found.commands[1][1:])
    for script in ('A=(0 $HERE)\nrun "${A[@]}"0', 'set -- 0 $HERE\nrun "$@"0 $2'):
        assert not any(w.literal for w in read_script(script).commands[0][1:])
    for script in ("A=($HERE)\nrun ${A[1]} ${#A[@]}", "A=()\nA+=($HERE)\nrun ${A[1]} ${#A[@]}"):
        assert not any(w.literal for w in read_script(script).commands[0][1:])


def test_a_count_of_arguments_is_listed():
    assert "@" in read_script("B=1\nif [ $# -gt 0 ]; then B=2; fi\nrun $B").assumed
    assert "@" not in read_script("f() { run $#; }\nf").assumed
