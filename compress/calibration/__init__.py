"""Calibration and held-out text: documents, self-generated conversations, and the split between the two."""
