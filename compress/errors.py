"""Bad settings of a method, found only when it runs."""


class SettingError(ValueError):
    """A setting that does not fit. The message begins with its name; the caller puts the configuration's key before."""
