"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can mend: one sentence that names the file and the remedy.

    Entry points print it on standard error and exit with code 2; nothing has been overwritten by then.
    """

    def __init__(self, sentence: str):
        # A worker of a DataLoader raises it anew around its own traceback, whose last line is the sentence.
        super().__init__(sentence.rsplit("shared.errors.UserError: ", 1)[-1].strip())


class Stopped(BaseException):
    """A run was stopped from outside, which is no failure of it and no success: ``code`` is the exit code then.

    As KeyboardInterrupt it is no Exception, so that no other run of the same command is begun.
    """

    def __init__(self, code: int):
        super().__init__("stopped; the same command goes on from the last checkpoint")
        self.code = code
