"""Helpers around the loop, run as `uv run -m lab COMMAND`: see `uv run -m lab --help`."""
