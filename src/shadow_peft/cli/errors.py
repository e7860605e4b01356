"""The one exception that the verbs raise for a mistake in what was asked for."""


class UserError(Exception):
    """A mistake in what was asked for; the message says what was wrong and what to do."""
