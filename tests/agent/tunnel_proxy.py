"""HTTP proxy that tunnels (RFC 9110, section 9.3.6), to whatever port of this machine a request names."""

import base64
import socket
import threading


class TunnelProxy(threading.Thread):
    """Proxy on loopback.

    Attributes:
        asked: the destinations of all requests.
        credentials: (user, password) that it asks for; None for nobody.
        refusal: answers every request with this status line instead.
    """

    def __init__(self, *, credentials=None, host="127.0.0.1", refusal=""):
        super().__init__(daemon=True)
        self.asked, self.credentials, self.refusal = [], credentials, refusal
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family)
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        head = b""
        while b"\r\n\r\n" not in head:
            more = client.recv(4096)
            if not more:  # who only tries whether the proxy answers
                client.close()
                return
            head += more
        lines = head.decode().split("\r\n")
        self.asked.append(lines[0].split()[1])
        fields = dict(line.split(": ", 1) for line in lines[1:] if line)
        if self.refusal:
            client.sendall(f"HTTP/1.1 {self.refusal}\r\nContent-Length: 0\r\n\r\n".encode())
            client.close()
            return
        if self.credentials is not None:
            wanted = "Basic " + base64.b64encode(":".join(self.credentials).encode()).decode()
            if fields.get("Proxy-Authorization") != wanted:
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                client.close()
                return
        host, _, port = self.asked[-1].rpartition(":")
        try:
            server = socket.create_connection((host.strip("[]") if host == "[::1]" else "127.0.0.1", int(port)))
        except OSError:
            client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            client.close()
            return
        client.sendall(b"HTTP/1.1 200 OK\r\nVia: 1.1 here\r\n\r\n")
        threading.Thread(target=self._pump, args=(server, client), daemon=True).start()
        self._pump(client, server)

    @staticmethod
    def _pump(source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self):
        self.listener.close()
