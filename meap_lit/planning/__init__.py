"""Plan a recipe before it runs: memory, time, and the changes that make it fit."""
