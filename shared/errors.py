"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can fix: one sentence that names the file and the remedy.

    Entry points print it on standard error and exit with code 2; nothing has been overwritten by then.
    """

    def __init__(self, sentence: str):
        # A worker of a DataLoader raises it anew around its own traceback, whose last line is the sentence.
        super().__init__(sentence.rsplit("shared.errors.UserError: ", 1)[-1].strip())


class RunInterrupted(BaseException):
    """A signal ended a run, which is neither a failure nor a success of it: ``code`` is the exit code then.

    Like KeyboardInterrupt it is no Exception, so that no other run of the same command begins.
    """

    def __init__(self, code: int):
        super().__init__("interrupted; the same command continues from the last checkpoint")
        self.code = code

    def __reduce__(self):
        return type(self), (self.code,)
