"""Tasks that measure attention weights."""
