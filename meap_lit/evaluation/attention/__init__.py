"""Tasks that measure where attention goes."""
