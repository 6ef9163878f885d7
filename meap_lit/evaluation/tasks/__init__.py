"""Tasks of the evaluation."""
