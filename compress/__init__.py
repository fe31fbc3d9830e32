"""From a language model to a quantized one: targets, calibration, methods, quality."""
