"""The two halves of the band on a fork policy with a language model's token profile: `bandpo lab forks`.

`policy` has the policy and its exact measures, `regimes` the problems, `training` the runs, `plan` the cells of a study, `theory`
the drift of the entropy under noise, `figures` the pictures, and `page` the numbers of docs/halves.md.
"""
