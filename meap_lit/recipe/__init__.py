"""Recipes: files and their bases, the command line that reads them, what is wrong with one in a line."""
