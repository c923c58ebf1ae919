"""The corpus of specs: tests/corpus/README.md tells what its files hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Refused:
    """A resource that must be refused; `former` is what it is a change of."""

    name: str
    by: Literal["crd", "guard"]
    field: str
    says: str
    resource: dict[str, Any]
    former: dict[str, Any] | None = None


def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


VALID = {path.stem: _load(path) for path in sorted((CORPUS / "valid").glob("*.yaml"))}
INVALID = {path.stem: Refused(path.stem, **_load(path)) for path in sorted((CORPUS / "invalid").glob("*.yaml"))}
