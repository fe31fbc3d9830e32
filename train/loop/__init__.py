"""One training loop for everything that is trained here; tasks differ in their model and their losses."""
