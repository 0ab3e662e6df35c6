package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"sort"
	"sync"
	"sync/atomic"
	"time"
)

// path is what all loads ask for.
const path = "/v1/chat/completions"

// failuresKept are told in words; the others are only counted.
const failuresKept = 3

// aim is what a load asks of whom.
type aim struct {
	url, key, body          string
	count                   int
	warm, seconds, patience time.Duration
	opening                 time.Duration
}

func parse(name string, arguments []string, more func(*flag.FlagSet)) aim {
	var a aim
	flags := flag.NewFlagSet(name, flag.ExitOnError)
	flags.StringVar(&a.url, "url", "", "the gateway's address")
	flags.StringVar(&a.key, "key", "", "API key")
	flags.StringVar(&a.body, "body", "", "the request's JSON")
	flags.IntVar(&a.count, "count", 1, "connections")
	flags.DurationVar(&a.warm, "warm", 500*time.Millisecond, "time before what counts")
	flags.DurationVar(&a.seconds, "seconds", 3*time.Second, "time that counts")
	flags.DurationVar(&a.patience, "patience", 60*time.Second, "time for any answer, and between two pieces of one")
	flags.DurationVar(&a.opening, "opening", 0, "time for the last stream to begin, beyond the time before what counts")
	more(flags)
	_ = flags.Parse(arguments)
	return a
}

// request is the bytes of one request.
func (a aim) request() (host string, raw []byte, err error) {
	parsed, err := url.Parse(a.url)
	if err != nil {
		return "", nil, err
	}
	authorization := ""
	if a.key != "" {
		authorization = "authorization: Bearer " + a.key + "\r\n"
	}
	head := fmt.Sprintf("POST %s HTTP/1.1\r\nhost: %s\r\n%suser-agent: OpenAI/Python 2.0.0\r\naccept: application/json\r\n"+
		"content-type: application/json\r\ncontent-length: %d\r\n\r\n", path, parsed.Host, authorization, len(a.body))
	return parsed.Host, append([]byte(head), a.body...), nil
}

// results are what a load tells; times in microseconds.
type results struct {
	Seconds  float64  `json:"seconds"`
	Done     int64    `json:"done"`
	Failed   int64    `json:"failed"`
	Begun    int64    `json:"begun"`
	Failures []string `json:"failures"`
	P50      int64    `json:"p50_us"`
	P90      int64    `json:"p90_us"`
	P99      int64    `json:"p99_us"`
	Max      int64    `json:"max_us"`
	lock     sync.Mutex
	times    []int64
}

func (r *results) fail(err error) {
	r.lock.Lock()
	defer r.lock.Unlock()
	r.Failed++
	if len(r.Failures) < failuresKept {
		r.Failures = append(r.Failures, err.Error())
	}
}

func (r *results) add(times []int64) {
	r.lock.Lock()
	defer r.lock.Unlock()
	r.times = append(r.times, times...)
}

func (r *results) print(seconds float64) error {
	r.lock.Lock()
	defer r.lock.Unlock()
	r.Seconds, r.Done = seconds, int64(len(r.times))
	if r.Failures == nil {
		r.Failures = []string{}
	}
	sort.Slice(r.times, func(i, j int) bool { return r.times[i] < r.times[j] })
	// A percentile is a value that was measured, never between two.
	at := func(share int) int64 {
		if len(r.times) == 0 {
			return -1
		}
		return r.times[(len(r.times)*share+99)/100-1]
	}
	r.P50, r.P90, r.P99, r.Max = at(50), at(90), at(99), at(100)
	return json.NewEncoder(os.Stdout).Encode(r)
}

// window is what counts: it says so on stdout, for whoever reads the gateway's CPU.
type window struct {
	open, over int32
}

func (w *window) run(a aim) float64 {
	fmt.Println("begin")
	atomic.StoreInt32(&w.open, 1)
	began := time.Now()
	time.Sleep(a.seconds)
	atomic.StoreInt32(&w.open, 0)
	took := time.Since(began).Seconds()
	fmt.Println("end")
	atomic.StoreInt32(&w.over, 1)
	return took
}

func (w *window) counts() bool { return atomic.LoadInt32(&w.open) == 1 }
func (w *window) ended() bool  { return atomic.LoadInt32(&w.over) == 1 }

// requests asks for whole answers on count connections, one after the other on each, or at a rate whatever the answers
// take; then a time counts from the moment in which the request was due.
func requests(arguments []string) error {
	rate := 0.0
	a := parse("requests", arguments, func(flags *flag.FlagSet) {
		flags.Float64Var(&rate, "rate", 0, "requests a second in all; 0 for as many as come")
	})
	host, raw, err := a.request()
	if err != nil {
		return err
	}
	var w window
	var r results
	var next int64
	var running sync.WaitGroup
	began := time.Now()
	if rate > 0 {
		go keepTime()
	}
	one := func() {
		defer running.Done()
		var conn net.Conn
		var in *bufio.Reader
		times := make([]int64, 0, 4096)
		for !w.ended() {
			due := time.Now()
			if rate > 0 {
				due = began.Add(time.Duration(float64(atomic.AddInt64(&next, 1)) / rate * float64(time.Second)))
				until(due)
			}
			err := error(nil)
			if conn == nil {
				if conn, err = net.Dial("tcp", host); err == nil {
					in = bufio.NewReaderSize(conn, 32*1024)
				}
			}
			closes := false
			if err == nil {
				_ = conn.SetDeadline(time.Now().Add(a.patience))
				closes, err = exchange(conn, in, raw)
			}
			if err != nil && !w.ended() {
				r.fail(err)
				time.Sleep(10 * time.Millisecond)
			}
			if (err != nil || closes) && conn != nil {
				conn.Close()
				conn = nil
			}
			if err == nil && w.counts() {
				times = append(times, time.Since(due).Microseconds())
			}
		}
		r.add(times)
	}
	for i := 0; i < a.count; i++ {
		running.Add(1)
		go one()
	}
	time.Sleep(a.warm)
	seconds := w.run(a)
	running.Wait()
	return r.print(seconds)
}

func exchange(conn net.Conn, in *bufio.Reader, raw []byte) (closes bool, err error) {
	if _, err = conn.Write(raw); err != nil {
		return true, err
	}
	m, err := readHead(in)
	if err == nil {
		err = m.readBody(in)
	}
	if err == nil && m.first[1] != "200" {
		err = fmt.Errorf("status %s: %.300s", m.first[1], m.body)
	}
	return m.close, err
}

// streams opens count streams, spread over the time before what counts, and leaves all of them when that is over.
func streams(arguments []string) error {
	a := parse("streams", arguments, func(*flag.FlagSet) {})
	host, raw, err := a.request()
	if err != nil {
		return err
	}
	var w window
	var r results
	var begun int64
	var running sync.WaitGroup
	for i := 0; i < a.count; i++ {
		running.Add(1)
		go func(wait time.Duration) {
			defer running.Done()
			time.Sleep(wait)
			s := stream{window: &w, begun: &begun}
			if err := s.run(host, raw, a.patience); err != nil && !w.ended() {
				r.fail(err)
			}
			r.add(s.times)
		}(a.warm / 2 * time.Duration(i) / time.Duration(a.count))
	}
	time.Sleep(a.warm)
	until := time.Now().Add(a.opening)
	for int(atomic.LoadInt64(&begun)) < a.count && time.Now().Before(until) && !r.failed() {
		time.Sleep(10 * time.Millisecond)
	}
	r.Begun = atomic.LoadInt64(&begun)
	seconds := w.run(a)
	running.Wait()
	return r.print(seconds)
}

func (r *results) failed() bool {
	r.lock.Lock()
	defer r.lock.Unlock()
	return r.Failed > 0
}

// stream reads one streamed answer and how late each of its tokens is.
type stream struct {
	window *window
	begun  *int64
	times  []int64
	seen   bool
	inside bool
	due    int64
	tail   []byte
}

func (s *stream) run(host string, raw []byte, patience time.Duration) error {
	conn, err := net.Dial("tcp", host)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Write(raw); err != nil {
		return err
	}
	in := bufio.NewReaderSize(conn, 32*1024)
	m, err := readHead(in)
	if err != nil {
		return err
	}
	if m.first[1] != "200" {
		_ = m.readBody(in)
		return fmt.Errorf("status %s: %.300s", m.first[1], m.body)
	}
	return s.read(conn, in, m.chunked, patience)
}

func (s *stream) read(conn net.Conn, in *bufio.Reader, chunked bool, patience time.Duration) error {
	var cut unchunk
	for !s.window.ended() {
		// One reads what there is, at most what the buffer holds.
		if _, err := in.Peek(1); err != nil {
			return fmt.Errorf("%w after %.300s", err, s.tail)
		}
		data, _ := in.Peek(in.Buffered())
		now := time.Now()
		_ = conn.SetReadDeadline(now.Add(patience))
		if chunked {
			if err := cut.feed(data, func(part []byte) { s.take(part, now.UnixMicro()) }); err != nil {
				return err
			}
		} else {
			s.take(data, now.UnixMicro())
		}
		_, _ = in.Discard(len(data))
		if cut.done {
			return fmt.Errorf("the answer ended: %.300s", s.tail)
		}
	}
	return nil
}

// take looks for tokens: "@", a moment in microseconds, and anything that is no digit.
func (s *stream) take(data []byte, now int64) {
	s.tail = append(s.tail[:0], data...)
	for len(data) > 0 {
		if !s.inside {
			at := bytes.IndexByte(data, '@')
			if at < 0 {
				return
			}
			s.inside, s.due, data = true, 0, data[at+1:]
			continue
		}
		for len(data) > 0 && data[0] >= '0' && data[0] <= '9' {
			s.due, data = s.due*10+int64(data[0]-'0'), data[1:]
		}
		if len(data) > 0 {
			s.inside = false
			if !s.seen {
				s.seen = true
				atomic.AddInt64(s.begun, 1)
			}
			if s.window.counts() {
				s.times = append(s.times, now-s.due)
			}
		}
	}
}
