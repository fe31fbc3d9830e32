"""A small language model of the target's tokenizer that drafts for it (FastDraft, arXiv 2411.11055)."""
