"""What a recipe needs, before it runs: memory, time, and what to change if it does not fit."""
