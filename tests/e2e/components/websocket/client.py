"""What the Autobahn test suite asks of a WebSocket server, asked straight and through litegate.

    client.py DIRECT CLEAR TLS CLEAR2 TLS2 [CASE…]       ports on 127.0.0.1

CLEAR and TLS are a litegate's that speaks HTTP/1.1 to the server, CLEAR2 and TLS2 one's that speaks HTTP/2.

Each case sends bytes and holds all bytes that come back until the end. Straight to the server, they
must be what RFC 6455 and 7692 want. Through litegate, by HTTP/1.1 and by HTTP/2 (RFC 8441), in the
clear and in TLS, to a server of either, they must be the same bytes, and the server must have received the same bytes: a
tunnel adds nothing, drops nothing, and orders nothing anew.
"""

import asyncio
import base64
import hashlib
import itertools
import json
import random
import ssl
import struct
import sys
import zlib

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

PATIENCE = 30
# Cases at once.
AT_ONCE = 6
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

# --- frames ---------------------------------------------------------------------------------------

masks = random.Random(6455)


def frame(opcode, payload=b"", fin=True, rsv=0, masked=True, length=None):
    """A client's frame. `length` is how many bytes its length takes, if not the fewest."""
    size = len(payload)
    length = length or (1 if size < 126 else 2 if size < 1 << 16 else 8)
    bit = 0x80 if masked else 0
    head = bytes([fin << 7 | rsv << 4 | opcode])
    if length == 1:
        head += bytes([bit | size])
    elif length == 2:
        head += bytes([bit | 126]) + struct.pack("!H", size)
    else:
        head += bytes([bit | 127]) + struct.pack("!Q", size)
    if not masked:
        return head + payload
    mask = masks.randbytes(4)
    stream = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return head + mask + (int.from_bytes(payload, "big") ^ stream).to_bytes(size, "big")


def fragments(opcode, pieces, between=b""):
    """A message of several frames."""
    out = []
    for n, piece in enumerate(pieces):
        out.append(frame(CONTINUATION if n else opcode, piece, fin=n == len(pieces) - 1))
        out.append(between if n < len(pieces) - 1 else b"")
    return b"".join(out)


def cut(data, size):
    return [data[at : at + size] for at in range(0, len(data), size)] or [b""]


def close(code=1000, reason=b""):
    return frame(CLOSE, struct.pack("!H", code) + reason)


def frames(data):
    """A server's frames: (opcode, fin, rsv, payload)."""
    at, out = 0, []
    while at < len(data):
        first, second = data[at], data[at + 1]
        assert not second & 0x80, "a server masks nothing"
        at, size = at + 2, second
        if second == 126:
            (size,), at = struct.unpack_from("!H", data, at), at + 2
        elif second == 127:
            (size,), at = struct.unpack_from("!Q", data, at), at + 8
        assert at + size <= len(data), "the last frame is cut off"
        out.append((first & 15, first >> 7, first >> 4 & 7, bytes(data[at : at + size])))
        at += size
    return out


# --- cases ----------------------------------------------------------------------------------------


class Case:
    """`want`: the messages and pongs that come back, as (opcode, payload); then the close frame with
    `code` (`None`: with none; `False`: no such frame). A server that fails the connection may miss
    what the client still sends."""

    def __init__(self, name, sent, want=(), code=1000, **more):
        self.name, self.sent, self.want, self.code = name, sent, list(want), code
        self.reason = more.pop("reason", None)
        self.chop = more.pop("chop", None)
        self.mode = more.pop("mode", "echo")
        self.fields = more.pop("fields", [])
        # What the answer's head must say: (status, subprotocol, extensions).
        self.head = more.pop("head", (101, None, None))
        self.half = more.pop("half", False)
        assert not more, more

    @property
    def fails(self):
        return self.code not in (1000, None, False) and self.reason is None


def cases():
    yield from framing()
    yield from pings()
    yield from reserved()
    yield from fragmentation()
    yield from utf8()
    yield from closing()
    yield from limits()
    yield from handshakes()
    yield from deflate()


def echo(name, opcode, payload, **more):
    return Case(name, frame(opcode, payload) + close(), [(opcode, payload)], **more)


def framing():
    for opcode, byte in [(TEXT, b"*"), (BINARY, b"\xfe")]:
        for size in [0, 1, 125, 126, 127, 128, 4095, 65535, 65536, 65537]:
            for chop in [None, 1 if size < 200 else 997]:
                yield echo(f"1 framing: {opcode} of {size} by {chop}", opcode, byte * size, chop=chop)
    for size, length in [(0, 2), (125, 2), (125, 8), (126, 8), (65535, 8)]:
        sent = frame(BINARY, b"x" * size, length=length)
        yield Case(f"1 framing: {size} in a length of {length}", sent + close(), code=1002)
    yield Case("1 framing: unmasked", frame(TEXT, b"x", masked=False) + close(), code=1002)
    huge = b"\x82\xff" + b"\xff" * 8 + b"mask"
    yield Case("1 framing: a length of 64 bits", huge + close(), code=1002)


def pings():
    for payload in [b"", b"hello", b"\x00\xff\xfe\xfd", b"\xfe" * 125]:
        for chop in [None, 1]:
            sent = frame(PING, payload) + close()
            yield Case(f"2 ping of {len(payload)} by {chop}", sent, [(PONG, payload)], chop=chop)
            sent = frame(PONG, payload) + frame(PING, b"after") + close()
            name = f"2 pong unasked of {len(payload)} by {chop}"
            yield Case(name, sent, [(PONG, b"after")], chop=chop)
    yield Case("2 ping of 126", frame(PING, b"x" * 126) + close(), code=1002)
    for chop in [None, 1]:
        names = [b"payload-%d" % n for n in range(10)]
        sent = b"".join(frame(PING, name) for name in names) + close()
        yield Case(f"2 ten pings by {chop}", sent, [(PONG, name) for name in names], chop=chop)


def reserved():
    hello = frame(TEXT, b"Hello")
    for rsv in range(1, 8):
        for opcode, chop in itertools.product([TEXT, BINARY, PING, PONG, CLOSE], [None, 1]):
            sent = hello + frame(opcode, b"\x03\xe8", rsv=rsv) + frame(PING) + close()
            want = [(TEXT, b"Hello")]
            yield Case(f"3 reserved {rsv} on {opcode} by {chop}", sent, want, 1002, chop=chop)
    for opcode in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15]:
        for payload in [b"", b"reserved"]:
            sent = hello + frame(opcode, payload) + frame(PING) + close()
            name = f"4 opcode {opcode} of {len(payload)}"
            yield Case(name, sent, [(TEXT, b"Hello")], 1002)


def fragmentation():
    pieces = [b"fragment1", b"fragment2", b"", b"fragment4"]
    whole = b"".join(pieces)
    for opcode, chop in itertools.product([TEXT, BINARY], [None, 1]):
        name = f"of {opcode} by {chop}"
        sent = fragments(opcode, pieces) + close()
        yield Case(f"5 fragments {name}", sent, [(opcode, whole)], chop=chop)
        sent = fragments(opcode, pieces, frame(PING, b"mid")) + close()
        want = [(PONG, b"mid")] * 3 + [(opcode, whole)]
        yield Case(f"5 fragments and pings {name}", sent, want, chop=chop)
        sent = fragments(opcode, pieces, frame(PONG, b"mid")) + close()
        yield Case(f"5 fragments and pongs {name}", sent, [(opcode, whole)], chop=chop)
        sent = fragments(opcode, [b"", b"", b""]) + close()
        yield Case(f"5 empty fragments {name}", sent, [(opcode, b"")], chop=chop)
    for opcode in [PING, PONG, CLOSE]:
        sent = frame(opcode, b"", fin=False) + frame(CONTINUATION) + close()
        yield Case(f"5 a fragmented {opcode}", sent, code=1002)
    for fin in [True, False]:
        sent = frame(CONTINUATION, b"x", fin=fin) + frame(TEXT, b"y") + close()
        yield Case(f"5 nothing to continue {fin}", sent, code=1002)
        sent = fragments(TEXT, [b"a", b"b"]) + frame(CONTINUATION, b"x", fin=fin) + close()
        yield Case(f"5 nothing more to continue {fin}", sent, [(TEXT, b"ab")], 1002)
        sent = frame(TEXT, b"a", fin=False) + frame(TEXT, b"b", fin=fin) + close()
        yield Case(f"5 a message inside of one {fin}", sent, code=1002)


VALID = [
    "κόσμε", "Hello-µ@ßöäüàá-UTF-8!!", "\x00", "\x7f", "\x80", "\u07ff", "\u0800", "\uffff",
    "\U00010000", "\U0010ffff", "\ud7ff", "\ue000", "\ufffd", "\ufffe", "\U0001fffe", "\ufdd0",
]  # fmt: skip
# Markus Kuhn's: continuations alone, starts alone, cut off, impossible, overlong, surrogates.
INVALID = """80 bf 80bf 80bf80 80bf80bf80 c020df20 e020ef20 f020f720 f820fb20 c0 e080 f08080 f8808080
fc80808080 df efbf f7bfbf fbbfbfbf fdbfbfbfbf c0e080f08080 fe ff fefeffff c0af e080af f08080af
f8808080af fc80808080af c1bf e09fbf f08fbfbf f88087bfbfbf fc8083bfbfbf c080 e08080 f0808080 eda080
edadbf edae80 edafbf edb080 edbe80 edbfbf eda080edb080 edafbfedbfbf f4908080 f888808080
cebae1bdb9cf83cebceda080656469746564""".split()


def utf8():
    ways = [
        ("whole", lambda text: frame(TEXT, text), None),
        ("byte by byte", lambda text: frame(TEXT, text), 1),
        ("a byte a frame", lambda text: fragments(TEXT, cut(text, 1)), None),
    ]
    for way, pack, chop in ways:
        for text in VALID:
            text = f"<{text}>".encode()
            sent = pack(text) + close()
            yield Case(f"6 valid {text.hex()} {way}", sent, [(TEXT, text)], chop=chop)
        for text in INVALID:
            sent = pack(b"<" + bytes.fromhex(text) + b">") + frame(PING) + close()
            yield Case(f"6 invalid {text} {way}", sent, code=1007, chop=chop)
        text = bytes.fromhex("80bfc0afeda080")
        sent = pack(text).replace(b"\x81", b"\x82", 1) if way == "whole" else frame(BINARY, text)
        yield Case(f"6 binary is no text {way}", sent + close(), [(BINARY, text)], chop=chop)


def closing():
    for code in [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999]:
        for reason in [b"", b"Reason", "☺".encode() * 41]:
            name = f"7 code {code} and {len(reason)}"
            yield Case(name, close(code, reason), code=code, reason=reason)
    for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]:
        yield Case(f"7 invalid code {code}", close(code), code=1002)
    yield Case("7 no code", frame(CLOSE), code=None)
    yield Case("7 half a code", frame(CLOSE, b"\x03"), code=1002)
    yield Case("7 a long reason", close(1000, b"x" * 124), code=1002)
    yield Case("7 a reason that is no text", close(1000, b"\xce\xba\xed\xa0\x80"), code=1007)
    late = [("text", frame(TEXT, b"x")), ("ping", frame(PING)), ("close", close(1001))]
    for name, after in late:
        yield Case(f"7 {name} after the close", close() + after, reason=b"")
    sent = frame(TEXT, b"a", fin=False) + close() + frame(CONTINUATION, b"b")
    yield Case("7 a close inside of a message", sent, reason=b"")
    messages = [(BINARY, b"x" * size) for size in [1, 70_000, 0]]
    sent = b"".join(frame(*message) for message in messages)
    want = [*messages, (TEXT, b"you have ended")]
    yield Case("7 the client's half ends first", sent, want, False, half=True)
    sent = b"".join(frame(BINARY, b"x" * 1000) for _ in range(300))
    yield Case("7 the server's half ends first", sent, [(TEXT, b"bye")], False, mode="bye")


def limits():
    kilo, mega = 1 << 10, 1 << 20
    noise = random.Random(9).randbytes(mega) * 16
    for size in [64 * kilo, 256 * kilo, mega, 4 * mega, 16 * mega]:
        yield echo(f"9 binary of {size}", BINARY, noise[:size])
        yield echo(f"9 text of {size}", TEXT, ("☺".encode() * size)[: size // 3 * 3])
    for size, piece in [(mega, 64), (4 * mega, kilo), (4 * mega, 64 * kilo), (16 * mega, mega)]:
        sent = fragments(BINARY, cut(noise[:size], piece)) + close()
        yield Case(f"9 {size} in frames of {piece}", sent, [(BINARY, noise[:size])])
    for chop in [64, 1024]:
        yield echo(f"9 {128 * kilo} by {chop}", BINARY, noise[: 128 * kilo], chop=chop)
    for size in [0, 16, kilo, 16 * kilo]:
        sent = frame(BINARY, noise[:size]) * 500 + close()
        yield Case(f"9 500 of {size}", sent, [(BINARY, noise[:size])] * 500)
    sent = fragments(TEXT, cut(b"*" * 65536, 1300)) + close()
    yield Case("10 65536 in frames of 1300", sent, [(TEXT, b"*" * 65536)])


def handshakes():
    protocol = "sec-websocket-protocol"
    for offers, chosen in [
        (["superchat"], "superchat"),
        (["chat, superchat"], "superchat"),
        (["chat", "superchat"], "superchat"),
        (["chat"], None),
    ]:
        fields = [(protocol, offer) for offer in offers]
        head = (101, chosen, None)
        yield Case(f"11 subprotocols {offers}", close(), reason=b"", fields=fields, head=head)
    yield Case("11 refused", b"", code=False, mode="reject", head=(403, None, None))
    fields = [("sec-websocket-version", "12")]
    yield Case("11 version 12", b"", code=False, fields=fields, head=(426, None, None))
    fields = [("sec-websocket-extensions", "x-unknown; a=1")]
    yield Case("11 an unknown extension", close(), reason=b"", fields=fields)


def deflate():
    takeover = "client_no_context_takeover; server_no_context_takeover"
    for params, agreed in [
        ("", ""),
        ("client_no_context_takeover", "client_no_context_takeover"),
        ("server_no_context_takeover", "server_no_context_takeover"),
        (takeover, takeover),
        ("client_max_window_bits=9", "client_max_window_bits=9"),
        ("server_max_window_bits=9", "server_max_window_bits=9"),
    ]:
        offer = "permessage-deflate" + (f"; {params}" if params else "")
        answer = "permessage-deflate; " + agreed
        more = {
            "fields": [("sec-websocket-extensions", offer)],
            "head": (101, None, answer.rstrip("; ")),
        }
        bits = 9 if "client_max" in params else 15

        def packer():
            state = [None]

            def pack(payload):
                if state[0] is None or "client_no" in params:
                    state[0] = zlib.compressobj(wbits=-bits)
                packed = state[0].compress(payload) + state[0].flush(zlib.Z_SYNC_FLUSH)
                return packed[:-4]

            return pack

        for size in [0, 16, 1024, 65536]:
            text = ("{'n': %d, 'ü': 'x'}" % size * size).encode()[:size].decode(errors="ignore")
            pack, text = packer(), text.encode()
            sent = b"".join(frame(TEXT, pack(text), rsv=4) for _ in range(10)) + close()
            yield Case(f"12 {offer}: ten of {size}", sent, [(TEXT, text)] * 10, **more)
        pack, noise = packer(), random.Random(7692).randbytes(50_000)
        pieces = cut(pack(noise), 5000)
        sent = frame(BINARY, pieces[0], fin=False, rsv=4)
        sent += b"".join(frame(CONTINUATION, piece, fin=False) for piece in pieces[1:])
        sent += frame(CONTINUATION) + frame(TEXT, b"plain") + close()
        want = [(BINARY, noise), (TEXT, b"plain")]
        yield Case(f"12 {offer}: fragments, and one that is plain", sent, want, chop=997, **more)
        sent = frame(TEXT, packer()(b"\xff\xff"), rsv=4) + close()
        yield Case(f"12 {offer}: no text inside", sent, code=1007, **more)
        sent = frame(TEXT, b"\xff" * 9, rsv=4) + close()
        yield Case(f"12 {offer}: nothing deflated", sent, code=1007, **more)
        sent = frame(TEXT, b"a", fin=False) + frame(CONTINUATION, b"b", rsv=4) + close()
        yield Case(f"12 {offer}: the bit on a continuation", sent, code=1002, **more)
        yield Case(f"12 {offer}: another bit", frame(TEXT, b"a", rsv=2) + close(), code=1002, **more)


# --- ways to the server ---------------------------------------------------------------------------


class Http1:
    def __init__(self, port, tls=None):
        self.port, self.tls, self.writer = port, tls, None
        if tls:
            tls.set_alpn_protocols(["http/1.1"])

    async def open(self, path, fields):
        name = "localhost" if self.tls else None
        connected = asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.tls, server_hostname=name
        )
        self.reader, self.writer = await connected
        key = base64.b64encode(hashlib.sha256(path.encode()).digest()[:16]).decode()
        lines = [
            f"GET {path} HTTP/1.1",
            "host: localhost",
            "connection: upgrade",
            "upgrade: websocket",
            f"sec-websocket-key: {key}",
            *(f"{name}: {value}" for name, value in fields),
        ]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        status = int(head[0].split()[1])
        answer = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        if status == 101:
            proof = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
            accept = next(line for line in head if line.lower().startswith("sec-websocket-accept:"))
            assert accept.split(": ")[1] == base64.b64encode(proof).decode(), head
        return status, answer

    async def send(self, data):
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self):
        return await self.reader.read(1 << 16)

    def end(self):
        self.writer.write_eof()

    def finish(self):
        """Both halves are at their end."""
        self.writer.close()

    def leave(self):
        if self.writer:
            self.writer.close()


class Http2:
    def __init__(self, port, tls=None):
        self.port, self.tls, self.writer = port, tls, None
        if tls:
            tls.set_alpn_protocols(["h2"])

    async def open(self, path, fields):
        name = "localhost" if self.tls else None
        connected = asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.tls, server_hostname=name
        )
        self.reader, self.writer = await connected
        self.pump = asyncio.create_task(self.read())
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.flush()
        self.offered, self.head = asyncio.Event(), asyncio.get_running_loop().create_future()
        self.window, self.came = asyncio.Event(), asyncio.Queue()
        await self.offered.wait()
        self.stream = self.h2.get_next_available_stream_id()
        pseudo = [
            (":method", "CONNECT"),
            (":protocol", "websocket"),
            (":scheme", "https" if self.tls else "http"),
            (":path", path),
            (":authority", "localhost"),
        ]
        self.h2.send_headers(self.stream, pseudo + fields)
        self.flush()
        answer = dict(await self.head)
        # RFC 8441 section 5: 200 for what is 101 in HTTP/1.1.
        status = int(answer[":status"])
        return (101 if status == 200 else status), {n: v.lower() for n, v in answer.items()}

    def flush(self):
        if data := self.h2.data_to_send():
            self.writer.write(data)

    async def read(self):
        try:
            while data := await self.reader.read(1 << 16):
                for event in self.h2.receive_data(data):
                    self.see(event)
                self.flush()
        except (ConnectionError, ProtocolError) as error:
            self.came.put_nowait(error)
        self.came.put_nowait(ConnectionError("the connection ended before the stream"))

    def see(self, event):
        if isinstance(event, RemoteSettingsChanged):
            change = event.changed_settings.get(SettingCodes.ENABLE_CONNECT_PROTOCOL)
            if change and change.new_value == 1:
                self.offered.set()
            self.window.set()
        elif isinstance(event, ResponseReceived):
            self.head.set_result(event.headers)
        elif isinstance(event, DataReceived):
            self.came.put_nowait(event.data)
            if event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, StreamEnded):
            self.came.put_nowait(b"")
        elif isinstance(event, StreamReset):
            self.came.put_nowait(ConnectionError(f"the stream is reset: {event.error_code}"))
        elif isinstance(event, WindowUpdated):
            self.window.set()

    async def send(self, data):
        data = memoryview(data)
        while data:
            room = self.h2.local_flow_control_window(self.stream)
            room = min(room, self.h2.max_outbound_frame_size, len(data))
            if room <= 0:
                self.window.clear()
                await self.window.wait()
                continue
            self.h2.send_data(self.stream, bytes(data[:room]))
            data = data[room:]
            self.flush()
            await self.writer.drain()

    async def receive(self):
        while True:
            data = await self.came.get()
            if isinstance(data, Exception):
                raise data
            return data

    def end(self):
        self.h2.end_stream(self.stream)
        self.flush()

    def finish(self):
        # A client that closed the connection now would take back what is under way in it.
        try:
            self.end()
        except ProtocolError:
            pass  # it has ended already

    def leave(self):
        if self.writer:
            self.pump.cancel()
            self.writer.close()


# --- one case one way -----------------------------------------------------------------------------


async def attempt(case, way, path):
    """What came back: the head's facts, all bytes, and how it ended."""
    fields = list(case.fields)
    if not any(name == "sec-websocket-version" for name, _ in fields):
        fields.append(("sec-websocket-version", "13"))
    status, answer = await way.open(path, fields)
    names = ["sec-websocket-protocol", "sec-websocket-extensions"]
    head = (status, *(answer.get(name) for name in names))
    if status != 101:
        body = b""
        while len(body) < int(answer.get("content-length", 0)):
            body += await way.receive()
        return head, body, "refused"

    async def send():
        for piece in cut(case.sent, case.chop) if case.chop else [case.sent]:
            await way.send(piece)
        if case.half:
            way.end()

    sending = asyncio.create_task(send())
    came, ended = bytearray(), "eof"
    try:
        while data := await way.receive():
            came += data
    except ConnectionError as error:
        ended = f"reset: {error}"
    try:
        await sending
    except (ConnectionError, ProtocolError):
        # The server has ended: a client may still have been sending.
        assert case.fails, "it could not be sent"
    way.finish()
    return head, bytes(came), ended


async def received(direct, key):
    reader, writer = await asyncio.open_connection("127.0.0.1", direct)
    writer.write(f"GET /received/{key} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


def judge(case, head, came, ended):
    """What RFC 6455 wants, of the server alone: else the cases would prove nothing."""
    assert head == case.head, f"{head}, not {case.head}"
    if head[0] != 101:
        return
    assert ended == "eof", ended
    seen = frames(came)
    if case.code is not False:
        opcode, fin, rsv, payload = seen.pop()
        assert (opcode, fin, rsv) == (CLOSE, 1, 0), "no close frame"
        code = struct.unpack("!H", payload[:2])[0] if payload else None
        assert code == case.code, f"closed with {code}, not {case.code}"
        assert case.reason is None or payload[2:] == case.reason, payload
    inflate, messages = zlib.decompressobj(-15), []
    for opcode, fin, rsv, payload in seen:
        if rsv == 4 and "permessage-deflate" in (head[2] or ""):
            payload = inflate.decompress(payload + b"\0\0\xff\xff")
            if "server_no_context_takeover" in head[2]:
                inflate = zlib.decompressobj(-15)
        else:
            assert rsv == 0, rsv
        assert fin == 1
        messages.append((opcode, payload))
    lengths = [(opcode, len(payload)) for opcode, payload in messages]
    assert messages == case.want, f"came back: {lengths[:20]}"


def same_bytes(case, facts):
    """Whether the server received what was sent: all, or the start of it where it gave up."""
    if case.fails and "bytes" in facts:
        return case.sent.startswith(bytes.fromhex(facts["bytes"]))
    if case.fails:
        return facts["length"] <= len(case.sent)
    return facts["digest"] == hashlib.sha256(case.sent).hexdigest()


def tls():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def run(number, case, ports):
    direct, *gates = ports
    ways = {"straight": lambda: Http1(direct)}
    for to, (clear, secure) in [("HTTP/1.1", gates[:2]), ("HTTP/2", gates[2:])]:
        ways |= {
            f"HTTP/1.1 to {to}": lambda port=clear: Http1(port),
            f"HTTP/1.1 in TLS to {to}": lambda port=secure: Http1(port, tls()),
            f"HTTP/2 to {to}": lambda port=clear: Http2(port),
            f"HTTP/2 in TLS to {to}": lambda port=secure: Http2(port, tls()),
        }
        if case.half or case.mode == "bye":
            # Python's TLS has no half-closed state.
            del ways[f"HTTP/1.1 in TLS to {to}"]
    faults, straight = [], None
    for place, (name, way) in enumerate(ways.items()):
        key, way = f"{number}-{place}", way()
        try:
            seen = await asyncio.wait_for(attempt(case, way, f"/{case.mode}/{key}"), PATIENCE)
            if straight is None:
                judge(case, *seen)
                straight = seen
            head, came, ended = seen
            assert head == straight[0], f"the head says {head}, straight {straight[0]}"
            assert came == straight[1], (
                f"{len(came)} bytes came, straight {len(straight[1])}; {ended}: {came[:80]}"
            )
            assert ended == straight[2], f"ended by {ended}, straight by {straight[2]}"
            if head[0] == 101:
                facts = await asyncio.wait_for(received(direct, key), PATIENCE)
                assert same_bytes(case, facts), f"the server received {facts}"
                version = name.rpartition(" to ")[2] if straight is not seen else "HTTP/1.1"
                assert facts["version"] == version, f"by {facts['version']}"
        except (AssertionError, OSError, EOFError, asyncio.TimeoutError) as error:
            faults.append(f"{case.name}: {name}: {error or type(error).__name__}")
            if straight is None:
                break
        finally:
            way.leave()
    return faults, len(ways)


async def main():
    ports, wanted = [int(port) for port in sys.argv[1:6]], sys.argv[6:]
    places = asyncio.Semaphore(AT_ONCE)
    total = runs = 0

    async def bounded(number, case):
        async with places:
            return await run(number, case, ports)

    chosen = [case for case in cases() if not wanted or any(w in case.name for w in wanted)]
    results = await asyncio.gather(*(bounded(n, case) for n, case in enumerate(chosen)))
    faults = [fault for faults, _ in results for fault in faults]
    total, runs = len(chosen), sum(ways for _, ways in results)
    print("\n".join(faults))
    print(f"{total} cases, {runs} runs, {len(faults)} faults")
    sys.exit(1 if faults or not runs else 0)


asyncio.run(main())
