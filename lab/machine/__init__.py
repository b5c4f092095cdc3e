"""What this machine can do: doctor and profile."""
