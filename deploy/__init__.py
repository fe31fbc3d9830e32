"""The bundle: its file formats, the runtime that executes it, and the command line."""
