"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can mend: one sentence that names the file and the remedy.

    Entry points print it on standard error and exit with code 2; nothing has been overwritten by then.
    """

    def __init__(self, sentence: str):
        # A worker of a DataLoader raises it anew around its own traceback, whose last line is the sentence.
        super().__init__(sentence.rsplit("shared.errors.UserError: ", 1)[-1].strip())
