"""Errors that a user can act on; shown without a traceback."""


class InputError(ValueError):
    """What was given, what was expected, and what to do."""
