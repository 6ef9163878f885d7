"""The report on finished runs and evaluations: `command.py` reads and writes, the rest is what it is made of."""
