"""What proposes tokens: models, the text itself, and one drafter checked by another."""
