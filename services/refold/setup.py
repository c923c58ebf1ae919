"""What is wrong with how a process was set up."""


class SetupError(Exception):
    """A process can't work here with a setting that it was given; the text names it, and says what to give instead."""
