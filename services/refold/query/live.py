"""The live version as queries need it: its columns, its streams, and what reads it."""

from refold.projection.definition import Column, StreamRef, VersionDefinition
from refold.projection.readstore import KEY, VersionReads


class LiveVersion:
    """One version of the projection, at one time the live one.

    Args:
        version: its name.
        definition: what it folds.
        reads: what reads it in the read store.
    """

    def __init__(self, version: str, definition: VersionDefinition, reads: VersionReads) -> None:
        self.version = version
        self.definition = definition
        self.reads = reads
        #: Whether it is of a moment, so that nothing is missing once all until then is applied.
        self.ended = bool(definition.ends)
        #: What rows may be filtered and ordered by, where it has an index: the columns, and the key.
        self.comparable: dict[str, Column] = {
            KEY.name: KEY,
            **{column.name: column for column in definition.definition.columns},
        }
        self.streams: dict[str, StreamRef] = {stream.incarnation: stream for stream in definition.streams}
