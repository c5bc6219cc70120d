"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can mend: one sentence that names the file and the remedy.

    Entry points print it on standard error and exit with code 2; nothing has been overwritten by then.
    """
