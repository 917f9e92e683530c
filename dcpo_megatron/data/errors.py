"""The one error of this room."""


class DataError(ValueError):
    """Input that cannot be used. The message is one sentence: what, where (file and row), and what to do."""
