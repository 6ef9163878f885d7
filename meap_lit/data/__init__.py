"""From text on disk to micro-batches."""
