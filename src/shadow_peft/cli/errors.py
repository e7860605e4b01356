"""The exceptions that the verbs raise for a mistake of the user, and how errors of libraries become one line."""

from __future__ import annotations

LONGEST = 400
"""Characters of a library's message that are shown."""


class UserError(Exception):
    """A mistake of the user; the message says what was wrong and what to do.

    Attributes:
        status: the exit status of the process.
    """

    status = 1


class InterruptedRunError(UserError):
    """Ctrl-C; the message says how to go on."""

    status = 130


def one_line(error: BaseException) -> str:
    """The message of a library's exception without line breaks, cut where it grows too long; its type if it has none.

    A file that is not there is named; a `KeyError` says nothing but its key, so its type goes before it.
    """
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"there is no file {error.filename}"
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} ..."
