"""The files in which compress, train and deploy meet; numpy, jinja2 and the standard library only."""
