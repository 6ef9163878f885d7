"""What is claimed about speed, runnable by anyone."""
