"""`Table`: rows by name, to which other packages add their own."""

from collections.abc import Iterable
from typing import ClassVar, Protocol, TypeVar


class Named(Protocol):
    """What stands in a row."""

    name: ClassVar[str]


Row = TypeVar("Row", bound=Named)


class Table(list[Row]):
    """Rows in their order.

    Another package adds a row by `register`, from a general plugin of vLLM, which runs
    in every process.
    """

    def __init__(self, what: str, rows: Iterable[Row]) -> None:
        """`rows`, of which messages say that they are of kind `what`."""
        super().__init__(rows)
        self._what = what

    def register(self, row: Row) -> None:
        """Adds a row; again is idle."""
        if row.name not in {known.name for known in self}:
            self.append(row)

    def named(self, name: str) -> Row:
        """The row of that name.

        Raises:
            KeyError: If there is none.
        """
        for row in self:
            if row.name == name:
                return row
        known = [row.name for row in self]
        raise KeyError(f"there is no {self._what} {name!r}, only {known}")
