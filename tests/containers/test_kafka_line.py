"""Leader → Kafka → follower on real servers of two majors: everyone goes away in turn, nothing is lost."""

import time

import pytest

from tests.containers.line import SEED_ROWS, Line, wait_for
from tests.fix_containers import Server
from tests.fix_proxy import Proxy

one_way = pytest.mark.parametrize("line", ["15-17"], indirect=True)


def test_image_stream_and_a_restart_of_each_party(line: Line) -> None:
    with line.load() as load:
        shipper, applier = line.ship(), line.apply()
        line.await_rows(SEED_ROWS)
        line.more(load)

        shipper.kill()
        line.more(load)
        shipper = line.ship()
        applier.kill()
        line.more(load)
        applier = line.apply()
        line.await_caught_up()

        shipper.terminate()
        applier.terminate()
        line.more(load)
        shipper, applier = line.ship(), line.apply()
        line.await_caught_up()

        for server in (line.leader, line.kafka, line.follower):
            server.stop()
            server.start()
            line.more(load)
        line.await_caught_up()
        shipper.must_run()
        applier.must_run()
    line.must_be_equal(load)


@one_way
@pytest.mark.parametrize("party", ["leader", "kafka", "follower"])
def test_a_server_that_dies_under_load_is_waited_for(line: Line, party: str) -> None:
    parties: dict[str, Server] = {"leader": line.leader, "kafka": line.kafka, "follower": line.follower}
    server = parties[party]
    with line.load() as load:
        shipper, applier = line.ship(), line.apply()
        line.await_rows(SEED_ROWS)
        line.more(load)
        for end in (server.kill, server.stop):
            end()
            time.sleep(3)
            server.start()
            line.more(load)
            line.await_caught_up()
        shipper.must_run()
        applier.must_run()
    line.must_be_equal(load)


@one_way
def test_a_network_that_is_cut_and_frozen(line: Line) -> None:
    kafka = line.kafka.proxy
    assert kafka is not None
    with Proxy("127.0.0.1", line.leader.port) as leader, Proxy("127.0.0.1", line.follower.port) as follower:
        with line.load() as load:
            place, broker = leader.url(line.leader.url(line.database)), line.kafka.proxied_url
            shipper = line.ship(leader=place, broker=broker)
            applier = line.apply(follower=follower.url(line.follower.url(line.database)), broker=broker)
            line.await_rows(SEED_ROWS)
            line.more(load)
            for proxy in (leader, kafka, follower):
                before = proxy.connections
                for _ in range(3):
                    proxy.cut()
                    line.more(load, 10)
                proxy.refuse()
                line.more(load)
                proxy.thaw()
                line.await_caught_up()
                proxy.freeze()
                line.more(load)
                proxy.thaw()
                line.await_caught_up()
                assert proxy.connections > before, "nobody came back through the proxy"
            shipper.must_run()
            applier.must_run()
        line.must_be_equal(load)


@one_way
def test_kafka_is_down_at_the_start(line: Line) -> None:
    line.kafka.stop()
    impatient = line.ship("--retry-s", "1")
    assert impatient.status(within_s=60) == 69
    assert f"127.0.0.1:{line.kafka.port}" in impatient.said
    assert "remedy:" in impatient.said
    with line.load() as load:
        shipper, applier = line.ship(), line.apply()
        line.more(load)
        shipper.must_run()
        applier.must_run()
        line.kafka.start()
        line.await_rows(SEED_ROWS)
        line.await_caught_up()
    line.must_be_equal(load)


@one_way
def test_a_follower_started_later_has_it_all_from_the_topic(line: Line) -> None:
    """With the leader's shipper gone, and Kafka restarted since: what was acknowledged is still there, once."""
    with line.load() as load:
        line.ship("--until", "now").status(within_s=90)
        line.more(load)
    line.cdc("ship", line.leader.url(line.database), line.kafka.url, "--until", "now")
    line.kafka.kill()
    line.kafka.start()
    for _ in range(2):  # the second time there is nothing to do
        line.cdc("apply", line.kafka.url, line.follower.url(line.database), "--stream", line.stream, "--until", "end")
        line.must_be_equal(load)


@one_way
def test_a_second_shipper_and_a_second_applier_are_fenced(line: Line) -> None:
    with line.load() as load:
        shipper, applier = line.ship(), line.apply()
        line.await_rows(SEED_ROWS)
        assert line.ship("--retry-s", "1").status(within_s=60) == 82
        shipper.must_run()
        second = line.apply()
        wait_for(lambda: 82 in {applier.process.poll(), second.process.poll()}, "one of two appliers to be fenced")
        line.await_caught_up()
    line.must_be_equal(load)
