"""The stages of the pipeline, one file each; `graph` puts them together."""
