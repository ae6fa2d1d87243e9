"""Single experiments that show one thing each.

`bandpo lab preference` runs `preference` and `reranking`, `bandpo lab selection` runs `selection`; both commands are in
`command`. `tabular` is exact PPO-Clip on a finite MDP, used by `examples/tabular_ppo_clip.py`.
"""
