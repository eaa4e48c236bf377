"""Errors a user can act on: each says what is wrong, where, and what to do about it."""


class UserError(Exception):
    """Something in the user's input or environment is wrong; the message names it and the remedy.

    The command line prints the message alone, without a traceback.
    """


class DataError(UserError):
    """A data file cannot be used; the message names the file and the line or field."""


class ConfigError(UserError):
    """A configuration cannot be used; the message names the field's path."""
