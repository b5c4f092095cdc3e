"""The machine that a night runs on: what it has, and what it measures at."""
