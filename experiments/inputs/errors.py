"""Errors that a user can act on; shown without a traceback."""


class InputError(ValueError):
    """What was given, what was expected, and what to do."""


class PictureError(InputError):
    """A picture that a model's processor does not take."""
