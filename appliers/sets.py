"""Takes a batch as sets: its net effect on each table, planned without touching a row of the follower."""

from collections.abc import Iterable, Sequence
from typing import Final

from appliers.batch import Load, Log, Tables, Truncate, Write, incomplete, misfit
from appliers.changes import TURN_MAX, TableChanges
from cdc.record import TransactionHead
from cdc.wire import copy, pgoutput

_INSERT: Final = ord("I")
_NEW: Final = ord("N")
_BULK_MIN: Final = 64  # inserts in a row that are worth a COPY of their own


class Sets(Tables):
    """Plans a batch as net effects; what is pending for a table is planned before anything that must follow it."""

    def plan(self, logs: Iterable[Log]) -> list[Write | Load | Truncate]:
        """One plan for consecutive batches, whose descriptions of a relation must agree.

        :raises NotASetError: take it in steps.
        """
        self._tables: dict[bytes, TableChanges] = {}
        self._plan: list[Write | Load | Truncate] = []
        for log in logs:
            with log.located():
                for head, at, lengths in log.transactions():
                    self._transaction(log, head, at, lengths)
        self._settle_all()
        return self._plan

    def _transaction(self, log: Log, head: TransactionHead, at: int, lengths: Sequence[int]) -> None:
        body = log.batch.body
        tables = self._tables
        simple = not self._windows
        bulk = self._follower.bulk and simple
        number = 0
        while number < len(lengths):
            end = at + lengths[number]
            opcode = body[at]
            if opcode == _INSERT and bulk and len(lengths) - number >= _BULK_MIN:
                done, after = self._bulk(log, at, lengths, number)
                if done:
                    number, at = number + done, after
                    continue
                bulk = False  # this transaction is not of that kind
            table = tables.get(body[at + 1 : at + 5])
            if opcode == _INSERT and table is not None and simple:
                row, forms, place = pgoutput.read_tuple(body[at:end], 6)
                if len(row) != table.width or place != end - at or body[at + 5] != _NEW:
                    pgoutput.decode_change(body[at:end])  # which tells what else is wrong
                    raise misfit(table.relation, len(row))
                if b"u" in forms:
                    raise incomplete(table.relation)
                if b"t" in forms or b"t" in table.forms:
                    self._note(table, forms)
                table.insert(tuple(row))
            elif opcode in b"IUD":
                self._change(log, head, body[at:end])
            else:
                self._truncate(log, head, body[at:end])
            number, at = number + 1, end

    def _bulk(self, log: Log, at: int, lengths: Sequence[int], number: int) -> tuple[int, int]:
        """Take a long run of inserts as COPY data; nothing where the run is short."""
        body = log.batch.body
        far = at + sum(lengths[number : number + _BULK_MIN - 1])
        if body[far : far + 8] != body[at : at + 8]:
            return 0, at
        relation = log.relation(int.from_bytes(body[at + 1 : at + 5]))
        self._prepare(relation)
        table = self._tables.setdefault(body[at + 1 : at + 5], TableChanges(relation))
        if int.from_bytes(body[at + 6 : at + 8]) != table.width:
            raise misfit(relation, int.from_bytes(body[at + 6 : at + 8]))
        rows: list[bytes] = []
        done, after = pgoutput.copy_inserts(body, at, lengths, number, rows)
        if done:
            self._settle(table)
            self._plan.append(Load(relation, b"".join([copy.HEADER, *rows, copy.TRAILER]), done))
        return done, after

    def _change(self, log: Log, head: TransactionHead, message: bytes) -> None:
        change = pgoutput.decode_change(message)
        if not self._wanted(change.relation_id, head.lsn):
            return
        table = self._table(log, change.relation_id, message[1:5], head.lsn)
        for image in (change.before, change.after):
            if image is not None and len(image) != table.width:
                raise misfit(table.relation, len(image))
        if b"t" in change.forms or b"t" in table.forms:
            self._note(table, change.forms)
        if len(table.inserts) > TURN_MAX and change.op != "I":
            self._settle(table)
        before = tuple(change.before) if change.before is not None else None
        if change.op == "D":
            table.delete(before or ())
        elif change.op == "U":
            table.update(before, tuple(change.after or ()), full=change.before_kind == "O")
        else:
            if b"u" in change.forms:
                raise incomplete(table.relation)
            table.insert(tuple(change.after or ()))

    def _table(self, log: Log, relation_id: int, key: bytes, lsn: int) -> TableChanges:
        table = self._tables.get(key)
        tolerant = self._tolerant(relation_id, lsn)
        if table is None:
            relation = log.relation(relation_id)
            self._prepare(relation)
            table = self._tables[key] = TableChanges(relation, tolerant=tolerant)
        elif table.tolerant != tolerant:
            self._settle(table)
            table.tolerant = tolerant
        return table

    def _note(self, table: TableChanges, forms: bytes) -> None:
        """Some values are text. A column is of one form as long as its rows wait together."""
        wanted = bytes(new if new in b"bt" else old for old, new in zip(table.forms, forms, strict=True))
        if wanted != table.forms:
            self._settle(table)
            table.forms = wanted

    def _truncate(self, log: Log, head: TransactionHead, message: bytes) -> None:
        decoded = pgoutput.decode(message)
        if isinstance(decoded, pgoutput.Truncate):
            self._settle_all()
            self._plan.append(self._truncated(log, decoded, head.lsn))

    def _settle_all(self) -> None:
        for table in self._tables.values():
            self._settle(table)

    def _settle(self, table: TableChanges) -> None:
        self._plan += [Write(operation, rows, table.tolerant) for operation, rows in table.sets()]
        table.clear()
