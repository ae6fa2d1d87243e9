"""Experiments with trust regions on small problems.

`comparison` is `bandpo compare`: objectives against each other over paired seeds. `experiments` has the single experiments of
`bandpo lab`. Both use `bandpo.statistics` (intervals and tests of paired runs), and `backends` (worker processes or a Ray
cluster).
"""
