"""The pure parts of PostgreSQL's store: URLs, names, errors, findings."""

import re

import psycopg
import pytest
from psycopg import errors

from cdc import errors as ours
from cdc.stores.postgresql.connect import connect, safe_url, translate, translated
from cdc.stores.postgresql.preflight import Finding
from cdc.stores.postgresql.setup import Names, create_publication, create_slot, default_names, give_identity

SECRET = "hunter2secret"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"postgresql://u:{SECRET}@h:5433/db", "postgresql://u@h:5433/db"),
        (f"postgres://u@h/db?password={SECRET}&sslmode=require", "postgresql://u@h/db?sslmode=require"),
        (f"postgresql://u%40x:{SECRET}@[::1]/a%2Fb", "postgresql://u%40x@[::1]/a%2Fb"),
        (f"postgresql:///db?host=/run/pg&password={SECRET}", "postgresql://%2Frun%2Fpg/db"),
        (f"postgresql://u:{SECRET}@a:1,b:2/db", "postgresql://u@a:1,b:2/db"),
        (f"postgresql://u:x@{SECRET}@h/db", "postgresql://***"),
        (f"postgresql://u:{SECRET}", "postgresql://***"),
        (f"u:{SECRET}@h", "postgresql://***"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert safe_url(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://u:{SECRET}@h/db",
        f"u:{SECRET}@h/db",
        f"postgresql://u:p@{SECRET}@h/db",
        f"postgresql://u:p/{SECRET}@h/db",
        f"postgresql://u:{SECRET}",
        f"postgresql://u:{SECRET}@h:port/db",
        f"postgresql://u:{SECRET}@h/db?nonsense=1",
        f"postgresql://u:{SECRET}%zz@h/db",
        "",
    ],
)
def test_a_wrong_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ours.UsageError) as caught:
        connect(url)
    assert SECRET not in f"{caught.value} {caught.value.remedy}"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("password", ["pp", SECRET, "with space", "back\\slash", "quo'te"])
def test_a_failed_connection_does_not_tell_the_password(password: str) -> None:
    url = f"postgresql://u:{''.join(f'%{byte:02x}' for byte in password.encode())}@127.0.0.1:1/db"
    with pytest.raises(ours.UnavailableError) as caught:
        connect(url)
    assert not re.search(rf"(?<!\w){re.escape(password)}(?!\w)", str(caught.value))
    assert "127.0.0.1" in str(caught.value)


def test_a_message_is_scrubbed_of_what_looks_like_a_password() -> None:
    texts = [
        f"cannot reach postgresql://u:{SECRET}@h/db today",
        f"bad conninfo host=h password={SECRET} port=1",
        f"bad conninfo password='{SECRET} x' port=1",
        f"statement ALTER ROLE r PASSWORD '{SECRET}'",
    ]
    for text in texts:
        error = translate(psycopg.OperationalError(text))
        assert SECRET not in str(error)
        assert "***" in str(error)
    plain = "password authentication failed"
    assert str(translate(psycopg.OperationalError(plain))) == plain


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.InvalidPassword, ours.AccessError),
        (errors.InsufficientPrivilege, ours.AccessError),
        (errors.InvalidCatalogName, ours.ConfigurationError),
        (errors.TooManyConnections, ours.UnavailableError),
        (errors.AdminShutdown, ours.UnavailableError),
        (errors.CannotConnectNow, ours.UnavailableError),
        (errors.ConnectionFailure, ours.UnavailableError),
        (errors.ReadOnlySqlTransaction, ours.UnavailableError),
        (errors.DeadlockDetected, ours.TransientError),
        (errors.SerializationFailure, ours.TransientError),
        (errors.LockNotAvailable, ours.TransientError),
        (errors.QueryCanceled, ours.TransientError),
        (errors.UniqueViolation, ours.ConflictError),
        (errors.ForeignKeyViolation, ours.ConflictError),
        (errors.NumericValueOutOfRange, ours.SchemaError),
        (errors.UndefinedColumn, ours.SchemaError),
        (errors.UndefinedTable, ours.SchemaError),
        (errors.DatatypeMismatch, ours.SchemaError),
        (errors.UndefinedObject, ours.ConfigurationError),
        (errors.ObjectInUse, ours.FencedError),
        (errors.DiskFull, ours.LocalIOError),
        (errors.SyntaxError, ours.CdcError),
    ],
)
def test_a_state_decides_what_to_do_next(error: type[psycopg.Error], kind: type[ours.CdcError]) -> None:
    assert type(translate(error("something"))) is kind


def test_a_lost_slot_is_a_gap() -> None:
    text = 'can no longer get changes from replication slot "s"'
    assert type(translate(errors.ObjectNotInPrerequisiteState(text))) is ours.GapError
    text = "logical decoding requires wal_level >= logical"
    assert type(translate(errors.ObjectNotInPrerequisiteState(text))) is ours.ConfigurationError


def test_errors_without_a_state() -> None:
    assert type(translate(psycopg.OperationalError("server closed the connection"))) is ours.UnavailableError
    assert type(translate(psycopg.ProgrammingError("can't adapt"))) is ours.CdcError


def test_translated_keeps_the_cause_and_lets_others_pass() -> None:
    original = errors.UniqueViolation("duplicate")
    with pytest.raises(ours.ConflictError) as caught, translated():
        raise original
    assert caught.value.__cause__ is original
    with pytest.raises(KeyError), translated():
        raise KeyError


def test_names_follow_the_database() -> None:
    assert default_names("shop") == Names("cdc_shop", "cdc_shop", "cdc_shop")


def test_names_that_had_to_change_never_meet() -> None:
    odd = ["Shop", "shop-1", "shop 1", "shöp", "x" * 63, "x" * 62 + "y", "shop_1"]
    slots = [default_names(name).slot for name in odd]
    assert len(set(slots)) == len(odd)
    assert all(re.fullmatch(r"[a-z0-9_]{1,63}", slot) for slot in slots)
    assert default_names("x" * 63) == default_names("x" * 63)


def test_names_that_are_given_are_kept() -> None:
    assert default_names("shop", stream="My Stream").publication == "My Stream"
    assert default_names("shop", publication='p"q', slot="s") == Names("cdc_shop", 'p"q', "s")


@pytest.mark.parametrize("slot", ["Upper", "a-b", "a" * 64, "a;b"])
def test_a_slot_name_postgresql_would_refuse(slot: str) -> None:
    with pytest.raises(ours.UsageError, match="slot name"):
        default_names("shop", slot=slot)


@pytest.mark.parametrize("publication", ["é" * 32, "a\0b"])
def test_a_publication_name_postgresql_would_cut(publication: str) -> None:
    with pytest.raises(ours.UsageError, match="publication name"):
        default_names("shop", publication=publication)


def test_statements_by_server_version() -> None:
    assert "generated" not in create_publication("p", "FOR ALL TABLES", 170000)
    assert "publish_generated_columns = stored" in create_publication("p", "FOR ALL TABLES", 180000)
    assert create_slot("s", 160000).endswith("'pgoutput', false, false)")
    assert create_slot("s", 170000).endswith("'pgoutput', false, false, true)")
    assert give_identity('s"', "t;--", None) == 'ALTER TABLE "s"""."t;--" REPLICA IDENTITY FULL'


def test_a_remedy_is_a_script() -> None:
    finding = Finding("error", "s", "m", ("SELECT 1", "-- then wait"))
    assert finding.remedy == "SELECT 1;\n-- then wait"
