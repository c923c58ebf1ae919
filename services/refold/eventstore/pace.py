"""How many of the appends that wait go into the next group: all of them, or a half.

Callers that wait for their outcome, and then append again, would all stand in one group: while it is in its transaction
this process has nothing to do, and while the callers go on the database has nothing to do. In two groups by turns, one
is in its transaction while the callers of the other go on. That costs a transaction more for the same appends, so it
pays only where the callers' work takes longer than what a transaction takes whatever is in it.
"""

#: The weight of what was measured last.
_WEIGHT = 0.1


class Pace:
    """What transactions and callers take, in one lane."""

    def __init__(self) -> None:
        self._transaction = 0.0  # seconds that one takes
        self._append = 0.0  # seconds of this thread's work for one append: the caller's, checks, encoding, answer
        self._worked = 0.0

    def share(self, former: int, waiting: int) -> int:
        """Return how many appends the next group is to have; where fewer wait, the former ones' callers bring the rest.

        Args:
            former: appends of the group that is in its transaction, or has just ended, whose callers will go on; 0
                where nothing was under way.
            waiting: how many wait.
        """
        # About a half of a transaction's time depends on what is in it; the rest would be paid twice.
        if self._transaction / 2 > self._append * (former + waiting):
            return former + waiting
        return -(-(former + waiting) // 2)

    def took(self, appends: int, seconds: float, *, worked: float) -> None:
        """Note that the transaction of a group, which had so many appends, took so long.

        Args:
            appends: how many.
            seconds: how long.
            worked: seconds that this thread has worked, ever (time.thread_time).
        """
        if self._worked:
            self._append += _WEIGHT * ((worked - self._worked) / appends - self._append)
        self._worked = worked
        self._transaction += _WEIGHT * (seconds - self._transaction)
