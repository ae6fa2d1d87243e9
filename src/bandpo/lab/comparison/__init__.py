"""`bandpo compare`: objectives against each other on small models and on a bandit, over paired seeds.

In reading order: `plan` says which runs a comparison has, `study` makes those that are missing, and `loop` trains them. It
trains many small models of one of the `problems` at once (`stack`), each from a cached `warmup`, on one of the `devices`.
`architecture` says which models a stack can hold, and `decoding` computes one new token after the other. `exact` has the bandit
and the token trees, and `sweeps` runs the bandit over grids of settings. `summary` turns results into tables,
and `figures` and `report` show them. `command` is the command itself, and `terminal` has what it prints at its end. Objectives
of the user come from `own`, which records their `definitions`; `trial` tries them first. Claims about trust regions are judged
by `bandpo.lab.evidence`, where one factor differs at a time.
"""
