"""The one error of this room, and the one question about any text that a run will have to write."""


class DataError(ValueError):
    """Input that cannot be used. The message is one sentence: what, where (file and row), and what to do."""


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written: half of a surrogate pair (``"\\ud835"`` in JSON, a file name of other bytes)
    cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
