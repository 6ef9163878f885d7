"""The tasks of the evaluation, each a file, and what they share."""
