"""The one family of errors that a user of refattn can meet."""


class RefattnError(ValueError):
    """An input that refattn refuses, told in one sentence that states both sides."""
