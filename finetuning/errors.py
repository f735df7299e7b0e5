"""The one exception that means "not a bug": a mistake of the user's, or a failure of the world's."""


class UserError(Exception):
    """Something the person at the keyboard can put right; its text says what is wrong and what to do.

    `finetuning.cli.run` turns it into one line on standard error and exit status 2.
    """
