"""Steps that turn files into a dataset once: tokenize, split, write, merge."""
