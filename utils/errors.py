"""Errors that the user can fix, and the end of the work on a signal."""


class UserError(Exception):
    """An error that the user can fix: says what is wrong, where, and what to do.

    The scripts print it as one line and exit with `exit_code`; a traceback is shown only with
    `--debug`. Any other exception that escapes is a programming error and keeps its traceback.
    """

    exit_code = 1

    def __init__(self, what: str, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        super().__init__(what, self.where, fix)

    def __str__(self) -> str:
        """Return the message: `where: what; fix`."""
        start = f"{self.where}: " if self.where else ""
        end = f"; {self.fix}" if self.fix else ""
        return f"{start}{self.what}{end}"


class UsageError(UserError):
    """An invalid option or setting, found before any work starts (exit code 2)."""

    exit_code = 2


class StoppedError(Exception):
    """The work was ended cleanly on a signal.

    exit_code: 128 plus the signal's number, as in shells.
    """

    def __init__(self, signal_number: int, how_to_go_on: str = "") -> None:
        self.exit_code = 128 + signal_number
        super().__init__(how_to_go_on)


class Terminated(KeyboardInterrupt):
    """A signal to end has arrived. Like Ctrl-C it is no Exception, which libraries' callers catch.

    exit_code: 128 plus the signal's number, as in shells.
    """

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__()


def reason_of(error: BaseException) -> str:
    """Return the first line of a library's error message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
