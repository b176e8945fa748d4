"""Fitting by gradient: the one place of calibration that runs torch."""
