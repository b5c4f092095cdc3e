"""What this machine has and can do: devices, doctor and profile."""
