"""The two ways in which an expression goes wrong: when it is read, and when it meets an event."""


class CelError(ValueError):
    """An expression that can't be compiled. `line` and `column` are 1-based."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column

    def __str__(self) -> str:
        """Return the message with its place."""
        return f"{self.message} (line {self.line}, column {self.column})"


class EvaluationError(ValueError):
    """An expression without a value for an event. `line` and `column` (1-based) are None where no place is to blame."""

    def __init__(self, message: str, at: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = None if at is None else at[0]
        self.column = None if at is None else at[1]

    def __str__(self) -> str:
        """Return the message with its place."""
        return self.message if self.line is None else f"{self.message} (line {self.line}, column {self.column})"
