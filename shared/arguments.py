"""A command line whose errors are one sentence."""

import argparse

from shared.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where the arguments are wrong."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")
