"""Where a target comes from, and how it becomes a plain model directory."""
