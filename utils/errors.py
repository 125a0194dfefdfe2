"""The error that is the user's to mend, and the end that the user asked for."""


class UserError(Exception):
    """Something a person can put right: says what is wrong, where, and what to do.

    The scripts print it as one line and exit with `exit_code`; a traceback appears only with
    `--debug`. Everything else that escapes is a programming error and keeps its traceback.
    """

    exit_code = 1

    def __init__(self, what: str, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        super().__init__(what, self.where, fix)

    def __str__(self) -> str:
        """The message: `where: what; fix`."""
        start = f"{self.where}: " if self.where else ""
        end = f"; {self.fix}" if self.fix else ""
        return f"{start}{self.what}{end}"


class UsageError(UserError):
    """An option or a setting that cannot be right, found before any work starts (exit code 2)."""

    exit_code = 2


class StoppedError(Exception):
    """A signal ended the work in good order.

    exit_code: as a shell has it, 128 and the signal's number.
    """

    def __init__(self, signal_number: int, how_to_go_on: str = "") -> None:
        self.exit_code = 128 + signal_number
        super().__init__(how_to_go_on)


def reason_of(error: BaseException) -> str:
    """The first line that a library's error tells, or its kind where it tells nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
