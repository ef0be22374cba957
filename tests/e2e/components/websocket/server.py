"""A WebSocket server that echoes: wsproto, which answers each frame in its order.

What it sends is a function of the bytes that it was sent, however they were cut: two clients that
send the same must see the same.

    server.py PORT

GET /echo/KEY      every message comes back, of pings the pongs; then the closing handshake
GET /bye/KEY       a message and the end of the server's half at once; still reads the client's
GET /reject/KEY    403
GET /received/KEY  what came from the client of that connection once it has ended, as JSON
"""

import asyncio
import hashlib
import json
import sys

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

    def __init__(self):
        self.digest, self.length, self.start = hashlib.sha256(), 0, b""
        self.ended = asyncio.Event()

    def add(self, data):
        self.digest.update(data)
        self.length += len(data)
        if self.length <= TOLD:
            self.start += data

    def facts(self):
        facts = {"length": self.length, "digest": self.digest.hexdigest()}
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


async def websocket(head, mode, record, reader, writer):
    connection = WSConnection(ConnectionType.SERVER)
    out, agreed = greet(connection, head, mode)
    writer.write(out)
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


async def serve(reader, writer):
    record = None
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        _, mode, key = head.split(b" ", 2)[1].decode().split("/", 2)
        if mode == "received":
            await tell(key, writer)
        else:
            record = received.setdefault(key, Received())
            await websocket(head, mode, record, reader, writer)
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
