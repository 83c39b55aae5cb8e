"""The errors a user can cause. Each message says what, which value, and what to do."""

from ping_llm.text import safe


class PingLLMError(Exception):
    """An error whose message is for the user: the CLI prints it in one line and exits with 1.

    What a file or a name put into the message cannot move the cursor or break the line.
    """

    def __init__(self, message: object = ""):
        super().__init__(safe(message))


class ConfigError(PingLLMError):
    """A setting has a value that cannot be, or does not fit the others."""


class DataError(PingLLMError):
    """Input data cannot be read, or is not what it should be."""


class StorageError(PingLLMError):
    """A file or object store did not do what was asked of it."""


class LockedError(StorageError):
    """A local file is locked by another process that does not go on, such as a stopped one."""


class CheckpointError(PingLLMError):
    """A checkpoint cannot be written, read, or fitted to the model it is for."""


class TrainingError(PingLLMError):
    """Training cannot go on, such as after a loss that is not a number."""


class Stopped(BaseException):
    """A signal ended the work, which was saved first where there was something to save.

    Not an `Exception`, like `KeyboardInterrupt`: nothing on the way should take it for an error.

    Attributes:
        signum: The signal.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum
