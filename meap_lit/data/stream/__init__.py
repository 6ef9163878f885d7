"""Which sample is read when, and the micro-batches that training and validation read."""
