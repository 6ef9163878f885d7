"""The rows of a training step as the model gets them, for a person to read."""
