"""Trajectories to scales: statistics, range methods, partitions."""
