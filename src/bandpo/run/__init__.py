"""The commands: train, evaluate, report. Everything here stands on TRL and needs the extra `lab`."""
