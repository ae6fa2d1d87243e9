"""`bandpo lab evidence`: a registered protocol, the runs that it names, and verdicts on its claims.

`protocol` reads protocol.yaml, which is committed before the runs, and `judge` turns the values of the runs into verdicts.
`study` makes the runs (on exact policies by `lab.forks`, on small transformers by `transformers`), `command` is the command,
and `figures` draws. `tools/evidence.py` writes the pages from the result.
"""
