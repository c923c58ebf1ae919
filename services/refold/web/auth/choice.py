"""From the setting `REFOLD_AUTH` to the way that decides who may call."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from refold.web.auth.access import Authority
from refold.web.auth.everyone import Everyone

#: `kubernetes`, `tokens:FILE` or `none`.
Choice = Annotated[str, Field(pattern=r"^(kubernetes|none|tokens:.+)$")]
DEFAULT = "kubernetes"


def authority(choice: str) -> Authority:
    """Return what `choice` names. The ways are imported only where they are wanted.

    Raises:
        SetupError: it can't work here; the text says what to give instead.
    """
    if choice == "none":
        return Everyone()
    if choice.startswith("tokens:"):
        from refold.web.auth.tokens import TokensFile

        return TokensFile(Path(choice.removeprefix("tokens:")))
    from refold.web.auth.kubernetes import Kubernetes
    from refold.web.auth.reviews import Reviews

    return Kubernetes(Reviews.in_cluster())
