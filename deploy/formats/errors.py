"""The two refusals of this package; both are ValueErrors, so that callers need not import them."""


class FormatError(ValueError):
    """A file does not have the documented format; the message names the file and the reason."""


class BundleError(ValueError):
    """A bundle is incomplete, altered or too new; the message names the file and the reason."""
