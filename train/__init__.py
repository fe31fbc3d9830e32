"""Training of drafters on what the quantized target says."""
