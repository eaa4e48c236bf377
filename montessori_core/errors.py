"""Errors for the user: what is wrong, where, and how to fix it."""


class UserError(Exception):
    """The user's input or environment is wrong; the message names the problem and the remedy.

    The command line prints the message without a traceback.
    """


class DataError(UserError):
    """A data file cannot be used; the message names the file and the line or field."""


class ConfigError(UserError):
    """A configuration cannot be used; the message names the field's path."""
