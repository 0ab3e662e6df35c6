package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"
)

// What rma_core/models/channel.py says of messages.
const (
	dataPart, dataLast, control = 0, 1, 2
	recordHead                  = 9
	windowBytes                 = 256 * 1024
	maxData                     = 32 * 1024
	bundleBytes                 = 64 * 1024
)

const beatEvery = 10 * time.Second

// identity is one worker as stdin gives it: who it is, and the two frames that it says.
type identity struct {
	URL, Token, Hello, Beat string
}

// worker keeps the channels of some workers open until one of them breaks.
func worker([]string) error {
	go keepTime()
	broken := make(chan error)
	opened := 0
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); opened++ {
		var one identity
		if err := json.Unmarshal(lines.Bytes(), &one); err != nil {
			return err
		}
		link, err := openChannel(one)
		if err != nil {
			return err
		}
		go func() { broken <- link.run(one) }()
	}
	fmt.Println("ready")
	if opened == 0 {
		return fmt.Errorf("stdin names no worker")
	}
	return <-broken
}

// channel is one worker's WebSocket; records that are ready together leave in one message, as the agent's do.
type channel struct {
	socket  *socket
	lock    sync.Mutex
	changed *sync.Cond
	waiting []byte
	tasks   map[uint32]*task
	err     error
}

type task struct {
	number uint32
	body   []byte
	room   int
	gone   bool
}

// down is what of the coordinator's control frames matters here.
type down struct {
	Type   string
	Stream uint32
	Bytes  int
	Offer  struct {
		BodyURL string `json:"body_url"`
	}
}

func openChannel(one identity) (*channel, error) {
	opened, err := openSocket(one.URL, "/api/worker/channel", one.Token)
	if err != nil {
		return nil, err
	}
	c := &channel{socket: opened, tasks: map[uint32]*task{}}
	c.changed = sync.NewCond(&c.lock)
	err = opened.write(text, []byte(one.Hello))
	if err == nil {
		err = opened.write(text, []byte(one.Beat))
	}
	return c, err
}

func (c *channel) run(one identity) error {
	go c.send()
	go func() {
		for range time.Tick(beatEvery) {
			c.put(0, control, []byte(one.Beat), true)
		}
	}()
	for {
		opcode, payload, err := c.socket.read()
		if err != nil {
			return err
		}
		switch opcode {
		case text:
			c.control(payload)
		case binaryData:
			c.records(payload)
		case ping:
			err = c.socket.write(pong, payload)
		case closing:
			err = fmt.Errorf("the coordinator closed a channel: %q", payload)
		}
		if err != nil {
			return err
		}
	}
}

// send empties what waits into the connection: while one message leaves, the next gathers.
func (c *channel) send() {
	var spare []byte
	for {
		c.lock.Lock()
		for len(c.waiting) == 0 {
			c.changed.Wait()
		}
		batch := c.waiting
		c.waiting = spare[:0]
		c.lock.Unlock()
		for rest := batch; len(rest) > 0; {
			size := bundled(rest)
			if err := c.socket.write(binaryData, rest[:size]); err != nil {
				return // whoever reads says it
			}
			rest = rest[size:]
		}
		spare = batch
	}
}

// bundled is how many bytes of whole records share the next message.
func bundled(records []byte) int {
	size := 0
	for size < len(records) {
		next := size + recordHead + int(binary.BigEndian.Uint32(records[size+5:]))
		if size > 0 && next > bundleBytes {
			break
		}
		size = next
	}
	return size
}

// put queues a record; without now it leaves with what follows.
func (c *channel) put(number uint32, kind byte, content []byte, now bool) {
	c.lock.Lock()
	c.append(number, kind, content)
	if now {
		c.changed.Broadcast()
	}
	c.lock.Unlock()
}

func (c *channel) append(number uint32, kind byte, content []byte) {
	var head [recordHead]byte
	binary.BigEndian.PutUint32(head[:], number)
	head[4] = kind
	binary.BigEndian.PutUint32(head[5:], uint32(len(content)))
	c.waiting = append(append(c.waiting, head[:]...), content...)
}

func (c *channel) records(payload []byte) {
	for len(payload) >= recordHead {
		number, kind := binary.BigEndian.Uint32(payload), payload[4]
		end := recordHead + int(binary.BigEndian.Uint32(payload[5:]))
		content := payload[recordHead:end]
		payload = payload[end:]
		if kind == control {
			c.control(content)
		} else if t := c.find(number); t != nil {
			t.body = append(t.body, content...)
			if kind == dataLast {
				go c.serve(t)
			}
		}
	}
}

func (c *channel) find(number uint32) *task {
	c.lock.Lock()
	defer c.lock.Unlock()
	return c.tasks[number]
}

func (c *channel) control(content []byte) {
	var frame down
	if err := json.Unmarshal(content, &frame); err != nil {
		fail(fmt.Errorf("a frame that is none: %q", content))
	}
	c.lock.Lock()
	defer c.lock.Unlock()
	t := c.tasks[frame.Stream]
	switch frame.Type {
	case "TASK":
		if frame.Offer.BodyURL != "" {
			fail(fmt.Errorf("a body that is read by HTTP is more than this worker knows"))
		}
		c.tasks[frame.Stream] = &task{number: frame.Stream, room: windowBytes}
		c.append(0, control, about("ACCEPT", frame.Stream, ""))
	case "CREDIT":
		if t != nil {
			t.room += frame.Bytes
			c.changed.Broadcast()
		}
	case "CANCEL":
		if t != nil {
			t.gone = true
			delete(c.tasks, frame.Stream)
			c.changed.Broadcast()
		}
	}
}

func about(kind string, number uint32, more string) []byte {
	out := append(make([]byte, 0, 64+len(more)), `{"type":"`...)
	out = append(append(out, kind...), `","stream":`...)
	out = strconv.AppendUint(out, uint64(number), 10)
	return append(append(out, more...), '}')
}

const (
	streamHeaders = `,"status":200,"headers":[["server","uvicorn"],["content-type","text/event-stream; charset=utf-8"]]`
	wholeHeaders  = `,"status":200,"headers":[["server","uvicorn"],["content-type","application/json"],["content-length","%d"]]`
)

// serve answers a task as a model server behind an agent would.
func (c *channel) serve(t *task) {
	began := time.Now()
	a := read(t.body)
	var err error
	if a.stream {
		c.put(0, control, about("HEAD", t.number, streamHeaders), false)
		err = play(a, func(event []byte) error { return c.data(t, event, true) })
	} else {
		body := whole(a)
		c.put(0, control, about("HEAD", t.number, fmt.Sprintf(wholeHeaders, len(body))), false)
		err = c.data(t, body, false)
	}
	if err != nil {
		return
	}
	timings := fmt.Sprintf(`,"timings":{"first_byte":0.001,"total":%.6f}`, time.Since(began).Seconds())
	c.put(0, control, about("END", t.number, timings), true)
	c.lock.Lock()
	delete(c.tasks, t.number)
	c.lock.Unlock()
}

// data sends a part of an answer as the window allows; it fails once nobody wants it.
func (c *channel) data(t *task, content []byte, now bool) error {
	c.lock.Lock()
	defer c.lock.Unlock()
	for len(content) > 0 {
		for t.room == 0 && !t.gone {
			c.changed.Broadcast()
			c.changed.Wait()
		}
		if t.gone {
			return fmt.Errorf("cancelled")
		}
		part := content
		if len(part) > t.room {
			part = part[:t.room]
		}
		if len(part) > maxData {
			part = part[:maxData]
		}
		t.room -= len(part)
		content = content[len(part):]
		c.append(t.number, dataPart, part)
	}
	if now {
		c.changed.Broadcast()
	}
	return nil
}
