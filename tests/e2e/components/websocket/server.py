"""A WebSocket server that echoes: wsproto, which answers each frame in its order.

What it sends is a function of the bytes that it was sent, however they were cut: two clients that
send the same must see the same. HTTP/1.1 and, by prior knowledge, HTTP/2 (RFC 8441) are spoken on one
port.

    server.py PORT

GET /echo/KEY      every message comes back, of pings the pongs; then the closing handshake
GET /bye/KEY       a message and the end of the server's half at once; still reads the client's
GET /reject/KEY    403
GET /received/KEY  what came from the client of that connection once it has ended, as JSON
"""

import asyncio
import base64
import hashlib
import json
import sys

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset, WindowUpdated
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.extensions import PerMessageDeflate
from wsproto.utilities import RemoteProtocolError

# What is told in full by /received; of more, its digest.
TOLD = 4096


class Received:
    """All that came behind the head, until its end."""

    def __init__(self, version="HTTP/1.1"):
        self.digest, self.length, self.start = hashlib.sha256(), 0, b""
        self.version = version
        self.ended = asyncio.Event()

    def add(self, data):
        self.digest.update(data)
        self.length += len(data)
        if self.length <= TOLD:
            self.start += data

    def facts(self):
        facts = {"length": self.length, "digest": self.digest.hexdigest(), "version": self.version}
        if self.length <= TOLD:
            facts["bytes"] = self.start.hex()
        return facts


received = {}


async def tell(key, writer):
    record = received.setdefault(key, Received())
    await asyncio.wait_for(record.ended.wait(), 20)
    body = json.dumps(record.facts()).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body))
    writer.write(body)
    await writer.drain()


def answer(connection, event, parts):
    """What goes out for an event, and whether it is the last."""
    if isinstance(event, (TextMessage, BytesMessage)):
        parts.append(event.data)
        if not event.message_finished:
            return b"", False
        whole = type(event.data)().join(parts)
        parts.clear()
        return connection.send(Message(data=whole)), False
    if isinstance(event, Ping):
        return connection.send(event.response()), False
    if isinstance(event, CloseConnection):
        if connection.state is ConnectionState.OPEN:
            # It gives up. Its own reason would say where in what it had read at once.
            event = CloseConnection(code=event.code)
        return connection.send(event.response()), True
    return b"", False


def greet(connection, head, mode):
    """Answers the request; returns the answer, and whether it is a WebSocket now."""
    try:
        connection.receive_data(head)
        request = next(iter(connection.events()))
        assert isinstance(request, Request)
        if mode == "reject":
            refusal = RejectConnection(
                status_code=403, has_body=True, headers=[(b"content-length", b"6")]
            )
            return connection.send(refusal) + connection.send(RejectData(data=b"go on!")), False
        subprotocol = "superchat" if "superchat" in request.subprotocols else None
        accept = AcceptConnection(extensions=[PerMessageDeflate()], subprotocol=subprotocol)
        return connection.send(accept), True
    except RemoteProtocolError as error:
        hint = error.event_hint
        headers = [*hint.headers, (b"content-length", b"0")]
        refusal = RejectConnection(headers=headers, status_code=hint.status_code)
        return connection.send(refusal), False


async def websocket(head, mode, record, reader, writer, begin):
    """`begin` sends the answer's head, and the body of a refusal."""
    connection = WSConnection(ConnectionType.SERVER)
    out, agreed = greet(connection, head, mode)
    begin(out)
    if not agreed:
        return await writer.drain()
    parts, open_ = [], True

    def finish(data):
        writer.write(data)
        writer.write_eof()

    if mode == "bye":
        finish(connection.send(Message(data="bye")))
        open_ = False
    while data := await reader.read(1 << 16):
        record.add(data)
        if not open_:
            continue
        connection.receive_data(data)
        for event in connection.events():
            out, last = answer(connection, event, parts)
            if last:
                finish(out)
                open_ = False
                break
            writer.write(out)
        await writer.drain()
    if open_:
        # Only the client's half has ended.
        finish(connection.send(Message(data="you have ended")))
    await writer.drain()


class Stream:
    """A stream of HTTP/2 as asyncio's reader and writer."""

    def __init__(self, streams, number):
        self.streams, self.number = streams, number
        self.came, self.over = asyncio.Queue(), False
        self.out, self.ending, self.ended = bytearray(), False, False
        self.room = asyncio.Event()

    async def read(self, _):
        while not self.over:
            data, window = await self.came.get()
            if data is None:
                raise ConnectionResetError("the stream is reset")
            # What is not read yet keeps the window small.
            self.streams.took(self.number, window)
            self.over = window == 0
            if data:
                return data
        return b""

    def begin(self, out):
        """What was made for HTTP/1.1."""
        head, body = out.split(b"\r\n\r\n", 1)
        first, *lines = head.decode().split("\r\n")
        status, of_http1 = first.split()[1], {"connection", "upgrade", "sec-websocket-accept"}
        fields = [tuple(line.lower().split(": ", 1)) for line in lines]
        fields = [field for field in fields if field[0] not in of_http1]
        # RFC 8441 section 5: 200 for what is 101 in HTTP/1.1.
        pseudo = [(":status", "200" if status == "101" else status)]
        self.streams.h2.send_headers(self.number, pseudo + fields)
        self.write(body)
        if status != "101":
            self.write_eof()

    def write(self, data):
        self.out += data
        self.push()

    def write_eof(self):
        self.ending = True
        self.push()

    def push(self):
        h2 = self.streams.h2
        try:
            while self.out and not self.ended:
                room = h2.local_flow_control_window(self.number)
                room = min(room, h2.max_outbound_frame_size, len(self.out))
                if room <= 0:
                    break
                h2.send_data(self.number, bytes(self.out[:room]))
                del self.out[:room]
            if self.ending and not self.out and not self.ended:
                self.ended = True
                h2.end_stream(self.number)
        except ProtocolError:
            # It was reset: nobody wants the rest.
            self.ended = True
            self.out.clear()
        self.room.set()
        self.streams.flush()

    async def drain(self):
        while len(self.out) > 1 << 16 or (self.ending and self.out):
            self.room.clear()
            await self.room.wait()
        await self.streams.writer.drain()


class Streams:
    """A connection of HTTP/2."""

    def __init__(self, reader, writer):
        self.reader, self.writer, self.open, self.tasks = reader, writer, {}, set()
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        values = {SettingCodes.ENABLE_CONNECT_PROTOCOL: 1, SettingCodes.MAX_CONCURRENT_STREAMS: 100}
        self.h2.local_settings = Settings(client=False, initial_values=values)
        self.h2.initiate_connection()

    async def serve(self, data):
        try:
            while data:
                for event in self.h2.receive_data(data):
                    self.see(event)
                self.flush()
                data = await self.reader.read(1 << 16)
        except ProtocolError as error:
            print(f"not HTTP/2: {error}", file=sys.stderr)
        for stream in self.open.values():
            stream.came.put_nowait((None, 0))

    def flush(self):
        if data := self.h2.data_to_send():
            self.writer.write(data)

    def took(self, number, window):
        if window:
            self.h2.acknowledge_received_data(window, number)
            self.flush()

    def see(self, event):
        if isinstance(event, RequestReceived):
            stream = self.open[event.stream_id] = Stream(self, event.stream_id)
            task = asyncio.create_task(self.answer(stream, event.headers))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        elif isinstance(event, WindowUpdated):
            # Of one, or of all together.
            for stream in list(self.open.values()):
                stream.push()
        elif stream := self.open.get(getattr(event, "stream_id", None)):
            if isinstance(event, DataReceived):
                if event.flow_controlled_length:
                    stream.came.put_nowait((event.data, event.flow_controlled_length))
            elif isinstance(event, StreamEnded):
                stream.came.put_nowait((b"", 0))
            elif isinstance(event, StreamReset):
                stream.came.put_nowait((None, 0))
                stream.ended = True
                stream.push()

    async def answer(self, stream, headers):
        pseudo = {name: value for name, value in headers if name.startswith(":")}
        assert pseudo[":method"] == "CONNECT" and pseudo[":protocol"] == "websocket", headers
        _, mode, key = pseudo[":path"].split("/", 2)
        lines = [
            f"GET {pseudo[':path']} HTTP/1.1",
            f"host: {pseudo[':authority']}",
            "connection: upgrade",
            "upgrade: websocket",
            f"sec-websocket-key: {base64.b64encode(bytes(16)).decode()}",
            *(f"{name}: {value}" for name, value in headers if not name.startswith(":")),
        ]
        assert not any(name in ("sec-websocket-key", "upgrade") for name, _ in headers), headers
        head = "\r\n".join([*lines, "", ""]).encode()
        record = received.setdefault(key, Received("HTTP/2"))
        try:
            await websocket(head, mode, record, stream, stream, stream.begin)
        except ConnectionError:
            pass
        finally:
            record.ended.set()
            stream.write_eof()
            while stream.out:
                stream.room.clear()
                await stream.room.wait()
            del self.open[stream.number]


async def serve(reader, writer):
    record = None
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"PRI "):
            return await Streams(reader, writer).serve(head)
        _, mode, key = head.split(b" ", 2)[1].decode().split("/", 2)
        if mode == "received":
            await tell(key, writer)
        else:
            record = received.setdefault(key, Received())
            await websocket(head, mode, record, reader, writer, writer.write)
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        if record:
            record.ended.set()
        writer.close()


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]), backlog=512)
    await server.serve_forever()


asyncio.run(main())
