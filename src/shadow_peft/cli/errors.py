"""The exception that the verbs raise for a mistake of the user."""


class UserError(Exception):
    """A mistake of the user; the message says what was wrong and what to do."""
