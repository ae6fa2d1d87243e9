"""Adapters into the hosts. Each imports its host, is thin, and holds no maths."""
