"""What a run tells people: one table, in the terminal, the model card and the HTML report."""
