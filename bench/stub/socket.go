package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/url"
	"strings"
)

// Opcodes of WebSocket (RFC 6455, 5.2).
const (
	text, binaryData, closing, ping, pong = 1, 2, 8, 9, 10
)

// maxMessage is more than a coordinator ever sends in one message.
const maxMessage = 4 * 1024 * 1024

// socket is the client's side of a WebSocket: messages of one frame each.
type socket struct {
	conn net.Conn
	in   *bufio.Reader
}

func openSocket(address, path, token string) (*socket, error) {
	parsed, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	conn, err := net.Dial("tcp", parsed.Host)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer %s\r\n\r\n",
		path, parsed.Host, token)
	in := bufio.NewReaderSize(conn, 64*1024)
	head, err := readHead(in)
	if err == nil && head.first[1] != "101" {
		err = fmt.Errorf("the upgrade was refused: %s", strings.Join(head.first[:], " "))
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &socket{conn, in}, nil
}

func (s *socket) read() (opcode byte, payload []byte, err error) {
	var head [10]byte
	if _, err = io.ReadFull(s.in, head[:2]); err != nil {
		return 0, nil, err
	}
	opcode, size := head[0]&15, uint64(head[1]&127)
	if head[0]&128 == 0 || head[1]&128 != 0 {
		return 0, nil, fmt.Errorf("a frame that is masked, or no whole message")
	}
	switch size {
	case 126:
		_, err = io.ReadFull(s.in, head[2:4])
		size = uint64(binary.BigEndian.Uint16(head[2:4]))
	case 127:
		_, err = io.ReadFull(s.in, head[2:10])
		size = binary.BigEndian.Uint64(head[2:10])
	}
	if err == nil && size > maxMessage {
		err = fmt.Errorf("a message of %d bytes", size)
	}
	if err != nil {
		return 0, nil, err
	}
	payload = make([]byte, size)
	_, err = io.ReadFull(s.in, payload)
	return opcode, payload, err
}

// write sends one message; payload is masked in place.
func (s *socket) write(opcode byte, payload []byte) error {
	out := make([]byte, 0, len(payload)+14)
	out = append(out, 128|opcode)
	switch size := len(payload); {
	case size < 126:
		out = append(out, 128|byte(size))
	case size < 1<<16:
		out = append(out, 128|126, byte(size>>8), byte(size))
	default:
		out = append(out, 128|127)
		out = binary.BigEndian.AppendUint64(out, uint64(size))
	}
	var mask [4]byte
	binary.LittleEndian.PutUint32(mask[:], rand.Uint32())
	out = append(out, mask[:]...)
	start := len(out)
	out = append(out, payload...)
	for i := start; i < len(out); i++ {
		out[i] ^= mask[(i-start)&3]
	}
	_, err := s.conn.Write(out)
	return err
}
