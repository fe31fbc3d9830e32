"""Training data that the target itself writes: prompts, engines that sample, conversations on disk."""
