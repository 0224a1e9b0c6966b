"""The one exception of the package: something the caller can mend, said in one line."""


class QuipError(ValueError):
    """Bad input. The message names what is wrong and where; the command line prints it and exits with status 2."""
