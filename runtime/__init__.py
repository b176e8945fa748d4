"""The sampling loop: numpy and an engine, nothing else."""
