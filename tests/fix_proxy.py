"""A network that fails on command: a TCP proxy that cuts, freezes and delays."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import pytest


class Proxy:
    """Listens on 127.0.0.1 and passes everything on to ``(host, port)``, until told otherwise."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._flowing = threading.Event()
        self._flowing.set()
        self.delay_s = 0.0
        self._refusing = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        self._listener.close()
        self.cut()

    def url(self, url: str) -> str:
        """The URL of a server, by way of this proxy."""
        scheme, _, rest = url.partition("://")
        user, _, place = rest.partition("@")
        return f"{scheme}://{user}@127.0.0.1:{self.port}/{place.partition('/')[2]}"

    def cut(self) -> None:
        """End every connection there is."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def refuse(self) -> None:
        """Cut, and end new connections at once, until :meth:`thaw`."""
        self._refusing = True
        self.cut()

    def freeze(self) -> None:
        """Let nothing through, without a word, until :meth:`thaw`."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._refusing = False
        self._flowing.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                self.connections += 1
                if self._refusing:
                    here.close()
                    continue
                there = socket.create_connection(self._target)
                self._pairs.append((here, there))
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                if self.delay_s:
                    time.sleep(self.delay_s)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


ProxyFactory = Callable[[str], Proxy]


@pytest.fixture
def proxy() -> Iterator[ProxyFactory]:
    """``proxy(url)`` stands before the server of that URL."""
    with contextlib.ExitStack() as stack:

        def make(url: str) -> Proxy:
            host, _, port = url.partition("@")[2].partition("/")[0].partition(":")
            return stack.enter_context(Proxy(host, int(port)))

        yield make
