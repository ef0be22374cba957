package main

import (
	"bufio"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// The longest WebSocket message that comes back.
const longestMessage = 1 << 20

// streams answers what has nothing to do with the database: answers of any length, event streams and
// WebSockets. It says whether the request was one for it.
func streams(w http.ResponseWriter, r *http.Request) bool {
	length, isBytes := strings.CutPrefix(r.URL.Path, "/bytes/")
	switch {
	case isBytes && r.Method == http.MethodGet:
		n, err := strconv.ParseInt(length, 10, 64)
		if err != nil || n < 0 {
			answer(w, http.StatusNotFound, nil, errors.New("no such length"))
			return true
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		pattern(w, n)
	case r.URL.Path == "/ticks" && r.Method == http.MethodGet:
		ticks(w, r)
	case r.URL.Path == "/socket":
		socket(w, r)
	default:
		return false
	}
	return true
}

// pattern writes n bytes of which each can be told from its place.
func pattern(w io.Writer, n int64) {
	piece := make([]byte, 0, 32<<10)
	for at := int64(0); at < n; {
		piece = piece[:0]
		for ; at < n && len(piece) < cap(piece); at++ {
			piece = append(piece, byte(at)^byte(at>>8)^byte(at>>16))
		}
		if _, err := w.Write(piece); err != nil {
			return
		}
	}
}

// ticks sends ?n= events, one ?every= so long, each with its number.
func ticks(w http.ResponseWriter, r *http.Request) {
	n, _ := strconv.Atoi(r.URL.Query().Get("n"))
	every, _ := time.ParseDuration(r.URL.Query().Get("every"))
	w.Header().Set("Content-Type", "text/event-stream")
	flush := http.NewResponseController(w)
	for i := range n {
		if _, err := fmt.Fprintf(w, "id: %d\ndata: tick %d\n\n", i, i); err != nil {
			return
		}
		if err := flush.Flush(); err != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-time.After(every):
		}
	}
}

// socket is a WebSocket that sends every message back (RFC 6455).
func socket(w http.ResponseWriter, r *http.Request) {
	key := r.Header.Get("Sec-WebSocket-Key")
	if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") || key == "" {
		answer(w, http.StatusUpgradeRequired, nil, errors.New("not a WebSocket"))
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		answer(w, http.StatusInternalServerError, nil, err)
		return
	}
	defer conn.Close()
	accept := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	fmt.Fprintf(buffered, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Accept: %s\r\nAbaci-Node: %s\r\n\r\n",
		base64.StdEncoding.EncodeToString(accept[:]), w.Header().Get("Abaci-Node"))
	for buffered.Flush() == nil {
		if last, err := echoFrame(buffered); err != nil || last {
			buffered.Flush()
			return
		}
	}
}

// echoFrame sends one frame back, unmasked, and says whether it was the last.
func echoFrame(conn *bufio.ReadWriter) (bool, error) {
	var head [2]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return false, err
	}
	length := uint64(head[1] & 0x7f)
	extended := map[uint64]int{126: 2, 127: 8}[length]
	if extended > 0 {
		var long [8]byte
		if _, err := io.ReadFull(conn, long[8-extended:]); err != nil {
			return false, err
		}
		length = binary.BigEndian.Uint64(long[:])
	}
	if length > longestMessage || head[1]&0x80 == 0 {
		return false, errors.New("too long, or without a mask")
	}
	var mask [4]byte
	if _, err := io.ReadFull(conn, mask[:]); err != nil {
		return false, err
	}
	payload := make([]byte, length)
	if _, err := io.ReadFull(conn, payload); err != nil {
		return false, err
	}
	for i := range payload {
		payload[i] ^= mask[i%4]
	}
	const ping, pong, last = 0x9, 0xa, 0x8
	opcode := head[0] & 0x0f
	if opcode == ping {
		opcode = pong
	}
	answer := []byte{head[0]&0xf0 | opcode}
	switch {
	case length < 126:
		answer = append(answer, byte(length))
	case length < 1<<16:
		answer = binary.BigEndian.AppendUint16(append(answer, 126), uint16(length))
	default:
		answer = binary.BigEndian.AppendUint64(append(answer, 127), length)
	}
	conn.Write(answer)
	_, err := conn.Write(payload)
	return opcode == last, err
}
