// Command abaci is the application of the end-to-end tests: one table of writes in SQLite on a
// LiteFS mount, and every question that a test asks about it.
//
//	any mutating method on /w/ID   reads the whole body, then inserts one row; 201 and the row.
//	                               ?linger=200ms waits between the commit and the answer.
//	GET /w/ID                      the rows with that id: two rows are a write executed twice
//	GET /ids                       every id with its number of rows
//	PUT /kv/KEY                    the key's value is now the body; 201
//	POST /kv/KEY                   the body joins the key's values; 201. Both take ?linger=
//	GET /kv/KEY                    the key's values, oldest first, as this node has them: what
//	                               litegate verify works with
//	GET /bytes/N                   N bytes, each of which tells its place
//	GET /ticks?n=9&every=50ms      so many server-sent events, numbered from 0
//	GET /socket                    a WebSocket that sends everything back
//	GET /whoami                    this node, and the request's header as it arrived
//	GET /healthz                   200
//
// After SIGTERM it answers what is on its connections, and leaves.
//
// Every answer carries Abaci-Node. There is no unique constraint on purpose.
package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	_ "github.com/mattn/go-sqlite3"
)

type row struct {
	ID     string `json:"id"`
	Node   string `json:"node"`
	Method string `json:"method"`
	Bytes  int64  `json:"bytes"`
	// FNV-1a, 64 bits, in hexadecimal: enough to notice a byte that is missing or out of place.
	Sum string `json:"sum"`
}

type app struct {
	node   string
	writer *sql.DB // one connection: SQLite has one writer
	reader *sql.DB
}

func main() {
	addr := flag.String("addr", "127.0.0.1:3000", "listen on")
	path := flag.String("db", "abaci.db", "the database's file")
	node := flag.String("node", "abaci-app-0", "this node's name")
	create := flag.Bool("create", false, "create the table: true on the primary")
	flag.Parse()

	a := &app{node: *node, writer: open(*path, 1), reader: open(*path, 4)}
	if *create {
		if _, err := a.writer.Exec(`CREATE TABLE IF NOT EXISTS writes
			(id TEXT NOT NULL, node TEXT NOT NULL, method TEXT NOT NULL, bytes INTEGER NOT NULL, sum TEXT NOT NULL)`); err != nil {
			log.Fatalf("create the table: %v", err)
		}
		if _, err := a.writer.Exec(`CREATE INDEX IF NOT EXISTS writes_by_id ON writes (id)`); err != nil {
			log.Fatalf("create the index: %v", err)
		}
		if _, err := a.writer.Exec(`CREATE TABLE IF NOT EXISTS kv (key TEXT NOT NULL, value TEXT NOT NULL)`); err != nil {
			log.Fatalf("create the table of keys: %v", err)
		}
		if _, err := a.writer.Exec(`CREATE INDEX IF NOT EXISTS kv_by_key ON kv (key)`); err != nil {
			log.Fatalf("create the index of keys: %v", err)
		}
	}

	go endWithParent()
	listener, err := net.Listen("tcp", *addr)
	if err != nil {
		log.Fatalf("listen: %v", err)
	}
	log.Printf("%s listens on %s", *node, *addr)
	serve(listener, a)
}

// serve leaves on SIGTERM as an app should that has an HTTP/1.1 proxy before it: no new connection,
// one more answer on each that there is, with "Connection: close", and only then the end. An idle
// connection that is closed from this side can meet a request that is on its way.
func serve(listener net.Listener, handler http.Handler) {
	var leaving atomic.Bool
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if leaving.Load() {
			w.Header().Set("Connection", "close")
		}
		handler.ServeHTTP(w, r)
	})}
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, syscall.SIGTERM)
	go func() {
		if err := server.Serve(listener); !leaving.Load() {
			log.Fatal(err)
		}
	}()
	<-terminated
	leaving.Store(true)
	listener.Close()
	time.Sleep(lastAnswers)
	limit, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := server.Shutdown(limit); err != nil {
		log.Fatalf("requests were still running: %v", err)
	}
	log.Print("has left")
}

// lastAnswers is how long a busy proxy may take to use every connection once more.
const lastAnswers = 300 * time.Millisecond

// endWithParent leaves when LiteFS, which started this process, is gone, however it went.
func endWithParent() {
	for parent := os.Getppid(); os.Getppid() == parent; {
		time.Sleep(100 * time.Millisecond)
	}
	log.Fatal("the parent process has ended")
}

func open(path string, connections int) *sql.DB {
	db, err := sql.Open("sqlite3", "file:"+path+"?_busy_timeout=5000&_journal_mode=WAL&_synchronous=NORMAL")
	if err != nil {
		log.Fatalf("open %s: %v", path, err)
	}
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	return db
}

func (a *app) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Abaci-Node", a.node)
	if streams(w, r) {
		return
	}
	id, isWrite := strings.CutPrefix(r.URL.Path, "/w/")
	key, isKey := strings.CutPrefix(r.URL.Path, "/kv/")
	isRead := r.Method == http.MethodGet || r.Method == http.MethodHead
	switch {
	case isWrite && id != "" && isRead:
		rows, err := a.rows(`SELECT id, node, method, bytes, sum FROM writes WHERE id = ?`, id)
		answer(w, http.StatusOK, rows, err)
	case isWrite && id != "":
		a.write(w, r, id)
	case isKey && key != "" && isRead:
		values, err := a.values(key)
		answer(w, http.StatusOK, map[string]any{"node": a.node, "values": values}, err)
	case isKey && key != "":
		a.keep(w, r, key)
	case r.URL.Path == "/ids" && isRead:
		ids, err := a.ids()
		answer(w, http.StatusOK, ids, err)
	case r.URL.Path == "/whoami" && isRead:
		answer(w, http.StatusOK, map[string]any{"node": a.node, "host": r.Host, "header": r.Header}, nil)
	case r.URL.Path == "/healthz" && isRead:
		answer(w, http.StatusOK, map[string]any{"node": a.node}, nil)
	default:
		answer(w, http.StatusNotFound, nil, errors.New("no such page"))
	}
}

func (a *app) write(w http.ResponseWriter, r *http.Request, id string) {
	sum := fnv.New64a()
	n, err := io.Copy(sum, r.Body)
	if err != nil {
		answer(w, http.StatusBadRequest, nil, fmt.Errorf("read the body: %w", err))
		return
	}
	written := row{id, a.node, r.Method, n, fmt.Sprintf("%016x", sum.Sum64())}
	if _, err := a.writer.Exec(`INSERT INTO writes (id, node, method, bytes, sum) VALUES (?, ?, ?, ?, ?)`,
		written.ID, written.Node, written.Method, written.Bytes, written.Sum); err != nil {
		answer(w, http.StatusInternalServerError, nil, fmt.Errorf("insert: %w", err))
		return
	}
	if linger, err := time.ParseDuration(r.URL.Query().Get("linger")); err == nil {
		time.Sleep(linger)
	}
	answer(w, http.StatusCreated, struct {
		row
		ReplaySrc string `json:"replay_src"`
	}{written, r.Header.Get("Fly-Replay-Src")}, nil)
}

// keep sets a key (PUT) or adds to it (anything else). There is no unique constraint here either.
func (a *app) keep(w http.ResponseWriter, r *http.Request, key string) {
	value, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 64<<10))
	if err != nil {
		answer(w, http.StatusBadRequest, nil, fmt.Errorf("read the body: %w", err))
		return
	}
	if err := a.put(key, string(value), r.Method == http.MethodPut); err != nil {
		answer(w, http.StatusInternalServerError, nil, err)
		return
	}
	if linger, err := time.ParseDuration(r.URL.Query().Get("linger")); err == nil {
		time.Sleep(linger)
	}
	answer(w, http.StatusCreated, map[string]any{"node": a.node, "key": key}, nil)
}

func (a *app) put(key, value string, replace bool) error {
	tx, err := a.writer.Begin()
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer tx.Rollback() // does nothing after Commit
	if replace {
		if _, err := tx.Exec(`DELETE FROM kv WHERE key = ?`, key); err != nil {
			return fmt.Errorf("delete: %w", err)
		}
	}
	if _, err := tx.Exec(`INSERT INTO kv (key, value) VALUES (?, ?)`, key, value); err != nil {
		return fmt.Errorf("insert: %w", err)
	}
	return tx.Commit()
}

func (a *app) values(key string) ([]string, error) {
	found, err := a.reader.Query(`SELECT value FROM kv WHERE key = ? ORDER BY rowid`, key)
	if err != nil {
		return nil, err
	}
	defer found.Close()
	values := []string{}
	for found.Next() {
		var value string
		if err := found.Scan(&value); err != nil {
			return nil, err
		}
		values = append(values, value)
	}
	return values, found.Err()
}

func (a *app) rows(query string, arguments ...any) ([]row, error) {
	found, err := a.reader.Query(query, arguments...)
	if err != nil {
		return nil, err
	}
	defer found.Close()
	rows := []row{}
	for found.Next() {
		var r row
		if err := found.Scan(&r.ID, &r.Node, &r.Method, &r.Bytes, &r.Sum); err != nil {
			return nil, err
		}
		rows = append(rows, r)
	}
	return rows, found.Err()
}

func (a *app) ids() (map[string]int, error) {
	found, err := a.reader.Query(`SELECT id, count(*) FROM writes GROUP BY id`)
	if err != nil {
		return nil, err
	}
	defer found.Close()
	ids := map[string]int{}
	for found.Next() {
		var id string
		var count int
		if err := found.Scan(&id, &count); err != nil {
			return nil, err
		}
		ids[id] = count
	}
	return ids, found.Err()
}

func answer(w http.ResponseWriter, status int, body any, err error) {
	if err != nil {
		if status < 400 {
			status = http.StatusInternalServerError
		}
		body = map[string]string{"error": err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(body); err != nil {
		log.Printf("answer: %v", err)
	}
}
