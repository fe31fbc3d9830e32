"""EAGLE-3 heads: the module, its training-time test, and how many tokens it would have saved on held-out text."""
