"""The error that ends a run although neither the input (that is a ValueError) nor the code is wrong."""


class StageError(RuntimeError):
    """A stage could not finish: workers or servers failed more often than allowed.

    The message says why, and what is kept for the next run.
    """
