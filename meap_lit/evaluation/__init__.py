"""Tasks that measure what a checkpoint finds in its context, and their statistics."""
