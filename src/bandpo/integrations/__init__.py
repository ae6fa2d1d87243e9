"""Adapters to the hosts: each imports its host, converts names and tensors, and contains no mathematics."""
