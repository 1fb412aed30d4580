"""``kafka://`` URLs, their options and environment, and the names that Kafka knows topics by: no server is needed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.brokers.kafka import Target, connect, decode_topic, encode_topic, parse
from cdc.errors import CdcError, LocalIOError, UsageError

SECRET = "s3cret"


def test_one_server_and_the_default_port() -> None:
    assert parse("kafka://h", {}) == Target(servers=(("h", 9092),))
    assert parse("kafka://h/", {}) == parse("kafka://h:9092/", {})


def test_several_servers_and_a_prefix() -> None:
    target = parse("kafka://a:1,b:2,[::1]:3,[fe80::1]/shop.", {})
    assert target.servers == (("a", 1), ("b", 2), ("::1", 3), ("fe80::1", 9092))
    assert target.prefix == "shop."
    assert target.label == "kafka://a:1,b:2,[::1]:3,[fe80::1]:9092"


@pytest.mark.parametrize(
    "url",
    [
        "kafka:/h",
        "http://h",
        "kafka://",
        "kafka:///topic",
        "kafka://h:",
        "kafka://h:0",
        "kafka://h:65536",
        "kafka://h:x",
        "kafka://h,",
        "kafka://h,h",
        "kafka://[::1",
        "kafka://h h",
        "kafka://h/a/b",
        "kafka://h/%20",
        "kafka://h/x#y",
        "kafka://h/" + "x" * 201,
        "kafka://h/?unknown=1",
        "kafka://h/?security=none",
        "kafka://h/?timeout-s=0",
        "kafka://h/?timeout-s=soon",
        "kafka://h/?retention-ms=-2",
        "kafka://h/?replicas=0",
        "kafka://h/?insecure=perhaps",
        "kafka://h/?security=plaintext&cafile=x",
        "kafka://h/?security=plaintext&username=x",
        "kafka://h/?keyfile=x",
        "kafka://h/?security=sasl_ssl",
        "kafka://h/?username=x",
        "kafka://u:p@h/?mechanism=OAUTHBEARER",
        "kafka://u:p@h/?mechanism=GSSAPI",
    ],
)
def test_what_is_not_understood_is_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        connect(url)
    assert caught.value.remedy


def test_options_from_the_query_win_over_the_environment() -> None:
    environ = {"CDC_KAFKA_RETENTION_MS": "60000", "CDC_KAFKA_REPLICAS": "3", "CDC_KAFKA_TIMEOUT_S": ""}
    target = parse("kafka://h/?retention-ms=1", environ)
    assert (target.retention_ms, target.replicas, target.timeout_s) == (1, 3, 30)


def test_security_follows_from_what_is_given() -> None:
    assert parse("kafka://h/?cafile=/x", {}).security == "ssl"
    assert parse("kafka://h/?certfile=/x&keyfile=/y", {}).security == "ssl"
    target = parse("kafka://u:p@h/", {})
    assert (target.security, target.mechanism) == ("sasl_ssl", "SCRAM-SHA-512")
    assert parse("kafka://u:p@h/?mechanism=plain", {}).mechanism == "PLAIN"


def test_a_password_comes_from_the_environment_a_file_or_the_url(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(SECRET + "\r\nanother line\n")
    assert parse("kafka://u@h", {"CDC_KAFKA_PASSWORD": SECRET}).password == SECRET
    assert parse("kafka://u@h", {"CDC_KAFKA_PASSWORD_FILE": str(path)}).password == SECRET
    assert parse(f"kafka://u@h/?password-file={path}", {"CDC_KAFKA_PASSWORD": "other"}).password == SECRET
    assert parse("kafka://u%40x:a%3A%2Fb@h/", {}).password == "a:/b"
    assert parse("kafka://h", {"CDC_KAFKA_USERNAME": "u", "CDC_KAFKA_PASSWORD": SECRET}).username == "u"


def test_a_password_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LocalIOError, match="nothing-here"):
        parse(f"kafka://u@h/?password-file={tmp_path}/nothing-here", {})


@pytest.mark.parametrize(
    "url",
    [
        f"kafka://u:{SECRET}@h:x/",
        f"kafka://u:{SECRET}@/",
        f"kafka://u:{SECRET}@h/?unknown=1",
        f"kafka://u:{SECRET}@h/?security=plaintext",
        f"kafka://u:{SECRET}@h/?security=sasl_plaintext",
        f"kafka://u:{SECRET}#x@h/",
        f"kafka://u:{SECRET}/x@h/",
        f"kafka://u:{SECRET}?x@h/",
        f"kafka://u@h/?password={SECRET}",
        f"kafka//u:{SECRET}@h",
        f"{SECRET}:kafka://h",
    ],
)
def test_no_message_holds_the_password(url: str) -> None:
    with pytest.raises(CdcError) as caught:
        parse(url, {})
    assert SECRET not in f"{caught.value} {caught.value.remedy}"


def test_nothing_shows_the_password() -> None:
    broker = connect(f"kafka://u:{SECRET}@127.0.0.1/")
    assert broker.target.password == SECRET
    assert SECRET not in f"{broker!r} {broker.target!r} {broker.target} {broker.target.label}"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_password_without_tls_goes_to_this_machine_only_and_on_request(host: str) -> None:
    url = f"kafka://u:{SECRET}@{host}/?security=sasl_plaintext"
    assert parse(f"{url}&insecure=true", {}).security == "sasl_plaintext"
    with pytest.raises(UsageError, match="without tls"):
        parse(url, {})
    with pytest.raises(UsageError, match="without tls"):
        parse(f"kafka://u:{SECRET}@{host},example.com/?security=sasl_plaintext&insecure=true", {})


def test_legal_names_are_kept() -> None:
    for name in ("orders", "shop.public.order_items", "A-b.C_d", "_", "-", "_-", "_-zz", "..."):
        assert encode_topic(name, "p.") == f"p.{name}"


@pytest.mark.parametrize(
    ("name", "topic"),
    [("a b", "a_-20b"), ("é", "_-C3_-A9"), ("..", "_-2E_-2E"), ("_-20", "_-5F-20"), ("a/b", "a_-2Fb")],
)
def test_other_names_are_escaped(name: str, topic: str) -> None:
    assert encode_topic(name) == topic
    assert decode_topic(topic) == name


@given(st.text(min_size=1, max_size=60), st.sampled_from(["", "shop.", "_-"]))
def test_names_come_back(name: str, prefix: str) -> None:
    try:
        topic = encode_topic(name, prefix)
    except UsageError:
        assert len(name.encode(errors="surrogatepass")) * 4 > 240 or any("\ud800" <= c <= "\udfff" for c in name)
        return
    assert set(topic) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert topic not in {".", ".."}
    assert decode_topic(topic, prefix) == name


@given(st.from_regex(r"[a-zA-Z0-9._-]{1,249}\Z"))
def test_no_two_topics_have_one_name(topic: str) -> None:
    name = decode_topic(topic)
    assert name is None or encode_topic(name) == topic


def test_topics_that_are_not_ours_have_no_name() -> None:
    assert decode_topic("shop.orders", "other.") is None
    assert decode_topic("_-41") is None  # a plain A is written as it is
    assert decode_topic("_-FF") is None  # not UTF-8


@pytest.mark.parametrize("name", ["", "x" * 250, "é" * 63, "\udcff"])
def test_names_kafka_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        encode_topic(name)
