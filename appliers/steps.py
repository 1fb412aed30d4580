"""Takes a batch change by change, in the leader's order, and says in words which change does not fit."""

from dataclasses import replace as changed_to
from typing import Final

from appliers.batch import Log, Tables, incomplete, misfit, write, write_rows
from appliers.changes import Identity, NotASetError, filled, identity
from cdc.errors import CdcError, ConflictError, DecodeError
from cdc.position import format_lsn
from cdc.record import NULL, UNCHANGED, Absent, Relation, Row, RowSet, TransactionHead
from cdc.wire import pgoutput
from cdc.wire.values import text_reader

_SHOWN: Final = 80  # characters of a value in a message


class Steps(Tables):
    """Takes a batch change by change, in the leader's order."""

    def take(self, log: Log) -> None:
        for head, message in log.messages():
            if message[0] in b"IUD":
                self._step(log, head, pgoutput.decode_change(message))
            elif isinstance(decoded := pgoutput.decode(message), pgoutput.Truncate):
                write(self._follower, [self._truncated(log, decoded, head.lsn)])

    def _step(self, log: Log, head: TransactionHead, change: pgoutput.Change) -> None:
        if not self._wanted(change.relation_id, head.lsn):
            return
        relation = log.relation(change.relation_id)
        self._prepare(relation)
        tolerant = self._tolerant(change.relation_id, head.lsn)
        found = identity(relation)
        try:
            rows, match = _single(relation, found, change)
        except NotASetError:
            raise DecodeError(f"a change of {relation.label} at {format_lsn(head.lsn)} names no row") from None
        try:
            if tolerant and change.op == "U" and found.unique:
                changed = self._move(rows, match)
            else:
                changed = write_rows(self._follower, change.op, rows, replace=tolerant)
        except CdcError as error:
            if isinstance(error, ConflictError):
                raise type(error)(
                    f"{_told(change, relation, match, rows, head)}: {error}", remedy=error.remedy
                ) from error
            raise
        if changed != 1 and not tolerant:
            raise ConflictError(
                f"{_told(change, relation, match, rows, head)} finds {changed} rows on the follower",
                remedy="the follower was written by somebody else: compare with `cdc verify`, and put the row back",
            )

    def _move(self, rows: RowSet, match: tuple[bytes, ...]) -> int:
        """An update where old and new row may each be there or not, as their chunks were copied before it or after.

        :raises ConflictError: it is not under its new key yet, and the log does not carry all of it.
        """
        values = dict(zip(rows.columns, rows.rows[0], strict=True))
        moved = tuple(values.get(index, old) for index, old in zip(rows.match, match, strict=True))
        if moved == match:
            return self._follower.update(rows)
        gone = changed_to(rows, columns=(), rows=[])
        if len(rows.columns) == len(rows.relation.columns):
            self._follower.delete(gone)
            return self._follower.insert(changed_to(rows, match=(), matches=[]), replace=True)
        if self._follower.update(changed_to(rows, matches=[moved])):
            self._follower.delete(gone)
        else:
            # The row under the old key may be another one by now: its values would be taken for this one's.
            raise ConflictError(
                "the row got another key while the image was copied, and the log does not carry all of it",
                remedy="take a new image with `cdc ship --image new`",
            )
        return 1


def _single(relation: Relation, found: Identity, change: pgoutput.Change) -> tuple[RowSet, tuple[bytes, ...]]:
    """One change as a set of one row, and the values that find its row."""
    forms = bytes(form if form in b"bt" else 0x62 for form in change.forms)
    before = tuple(change.before) if change.before is not None else None
    after = tuple(change.after) if change.after is not None else None
    for image in (before, after):
        if image is not None and len(image) != len(relation.columns):
            raise misfit(relation, len(image))
    match: tuple[bytes, ...] = ()
    if change.op != "I":
        match = found.of(before if before is not None else after or ())
    rows = RowSet(relation, forms, match=found.columns, unique=found.unique)
    if change.op != "I":
        rows.matches.append(match)
    if after is not None:
        if change.op == "I" and UNCHANGED in after:
            raise incomplete(relation)
        if before is not None and change.before_kind == "O":
            after = filled(after, before)
        rows.columns = tuple(index for index, value in enumerate(after) if value is not UNCHANGED)
        rows.rows.append(_present(after))
    return rows, match or rows.rows[0]


def _present(row: Row) -> tuple[bytes, ...]:
    return tuple([value for value in row if not isinstance(value, Absent)])


def _told(
    change: pgoutput.Change, relation: Relation, match: tuple[bytes, ...], rows: RowSet, head: TransactionHead
) -> str:
    """The change in words: ``update of public.t (id)=(5) at 0/16B3748``."""
    word = {"I": "insert into", "U": "update of", "D": "delete from"}[change.op]
    columns = rows.match if change.op != "I" else rows.columns
    names = ", ".join(relation.columns[index].name for index in columns)
    values = ", ".join(_shown(relation, index, rows.forms, value) for index, value in zip(columns, match, strict=False))
    return f"{word} {relation.label} ({names})=({values}) at {format_lsn(head.lsn)}"


def _shown(relation: Relation, index: int, forms: bytes, value: bytes) -> str:
    if value == NULL:
        return "null"
    if forms[index : index + 1] == b"t":
        text = value[4:].decode(errors="replace")
    else:
        types = {description.oid: description for description in relation.types}
        try:
            text = text_reader(relation.columns[index].type_oid, types)(value[4:])
        except CdcError:
            text = value[4:].hex()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
