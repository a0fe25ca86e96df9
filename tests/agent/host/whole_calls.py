"""Instance behind a router's client connections that answers each request at once, for tests of those connections."""

from dataclasses import dataclass, field


@dataclass
class Asked:
    """A request as it would go into a channel."""

    head: bytes
    body: bytearray = field(default_factory=bytearray)
    trailers: tuple = ()


class WholeCall:
    """One call: takes the request, and answers when it is whole."""

    def __init__(self, calls, client, exchange):
        self._calls, self._client, self._exchange = calls, client, exchange
        self.asked = Asked(exchange.head)

    @property
    def full(self):
        return self._calls.full

    def send_body(self, data):
        self.asked.body += data
        self._calls.bytes += len(data)
        self._calls.came.set()

    def end_body(self, trailers):
        self.asked.trailers = tuple(trailers)
        self._calls.asked.append(self.asked)
        self._calls.came.set()
        self._exchange.answering = True
        self._client.finish(self._exchange, self._calls.answer)

    def drop(self):
        self._calls.dropped += 1

    def pause(self):
        pass

    resume = drop_slow = pause


class Came:
    """Stands for an event where there is no loop."""

    def set(self):
        pass


class WholeCalls:
    """Calls of one instance, in place of `InstanceCalls`."""

    request_max = None
    waiting = 0
    full = False

    def __init__(self, came=None, answer=b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"):
        self.came = Came() if came is None else came
        self.answer = answer
        self.asked = []
        self.bytes = self.dropped = 0

    def call(self, client, exchange):
        return WholeCall(self, client, exchange)

    def count(self, _outcome):
        pass

    def refuse_all(self, status, why):
        pass
