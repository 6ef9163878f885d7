"""Generation, and a checkpoint as a language model."""
