"""Running a bundle: backends, sampling, sessions."""
