"""The two halves of the band on a fork policy with a language model's token profile: `bandpo lab forks`.

`policy` has the policy and its exact measures, `regimes` the problems, `training` the runs, `plan` the cells of a study,
`theory` the drift of the entropy under noise, `summary` the verdicts, `figures` the pictures, and `study` the command.
"""
