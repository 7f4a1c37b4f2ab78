"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """One sentence: what was wrong, what was expected, what to do. The command line prints it and exits with 1."""
