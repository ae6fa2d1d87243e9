"""The metrics of a run: each host's names for them, the rules that find symptoms in them, and the rules while a run goes.

Adapters and trainers report under these names; `bandpo.doctor` reads files, and applies the same rules.
"""
