package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"strconv"
)

// message is one HTTP/1.1 request or answer: its first line's parts, and its body unless it was left to the caller.
type message struct {
	first   [3]string
	length  int // -1 where none was announced
	chunked bool
	close   bool
	body    []byte
}

// readHead reads up to the empty line.
func readHead(in *bufio.Reader) (message, error) {
	m := message{length: -1}
	for number := 0; ; number++ {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return m, err
		}
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			return m, nil
		}
		if number == 0 {
			for i, part := range bytes.SplitN(line, []byte(" "), 3) {
				m.first[i] = string(part)
			}
			continue
		}
		colon := bytes.IndexByte(line, ':')
		if colon < 0 {
			return m, fmt.Errorf("no header: %q", line)
		}
		if err := m.header(line[:colon], bytes.TrimSpace(line[colon+1:])); err != nil {
			return m, err
		}
	}
}

func (m *message) header(name, value []byte) (err error) {
	switch {
	case bytes.EqualFold(name, []byte("content-length")):
		m.length, err = strconv.Atoi(string(value))
	case bytes.EqualFold(name, []byte("transfer-encoding")):
		m.chunked = bytes.EqualFold(value, []byte("chunked"))
	case bytes.EqualFold(name, []byte("connection")):
		m.close = bytes.EqualFold(value, []byte("close"))
	}
	return err
}

// readBody reads a body whole; one that was neither announced nor chunked is empty.
func (m *message) readBody(in *bufio.Reader) error {
	if !m.chunked {
		if m.length > 0 {
			m.body = make([]byte, m.length)
			_, err := io.ReadFull(in, m.body)
			return err
		}
		return nil
	}
	for {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return err
		}
		size, err := strconv.ParseUint(string(bytes.TrimRight(line, "\r\n")), 16, 31)
		if err != nil {
			return err
		}
		part := make([]byte, size+2)
		if _, err := io.ReadFull(in, part); err != nil {
			return err
		}
		if size == 0 {
			return nil
		}
		m.body = append(m.body, part[:size]...)
	}
}

// unchunk takes the chunks' heads out of what comes in pieces of any size; done once the last has come.
type unchunk struct {
	left  uint64
	state int // 0: a head, 1: data, 2: the line's end behind data, 3: trailers
	head  []byte
	done  bool
}

func (u *unchunk) feed(data []byte, take func([]byte)) error {
	for len(data) > 0 && !u.done {
		switch u.state {
		case 1:
			part := data
			if uint64(len(part)) > u.left {
				part = part[:u.left]
			}
			take(part)
			u.left -= uint64(len(part))
			data = data[len(part):]
			if u.left == 0 {
				u.state = 2
			}
			continue
		}
		at := bytes.IndexByte(data, '\n')
		if at < 0 {
			u.head = append(u.head, data...)
			return nil
		}
		line := bytes.TrimRight(append(u.head, data[:at]...), "\r")
		data = data[at+1:]
		u.head = u.head[:0]
		switch u.state {
		case 0:
			size, err := strconv.ParseUint(string(line), 16, 31)
			if err != nil {
				return err
			}
			u.left, u.state = size, 1
			if size == 0 {
				u.state = 3
			}
		case 2:
			u.state = 0
		case 3:
			u.done = len(line) == 0
		}
	}
	return nil
}
