package main

import (
	"bufio"
	"flag"
	"fmt"
	"net"
	"sync/atomic"
	"time"
)

// active is how many streams are open: clients that left are not always noticed by the gateway between.
var active int64

// backend is a model server that only looks like one.
func backend(arguments []string) error {
	flags := flag.NewFlagSet("backend", flag.ExitOnError)
	address := flags.String("listen", "127.0.0.1:8000", "address")
	_ = flags.Parse(arguments)
	listener, err := net.Listen("tcp", *address)
	if err != nil {
		return err
	}
	go keepTime()
	fmt.Println("ready")
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go answer(conn)
	}
}

func answer(conn net.Conn) {
	defer conn.Close()
	in := bufio.NewReaderSize(conn, 16*1024)
	for {
		m, err := readHead(in)
		if err == nil {
			err = m.readBody(in)
		}
		if err == nil {
			err = reply(conn, &m)
		}
		if err != nil || m.close {
			return
		}
	}
}

func reply(conn net.Conn, m *message) error {
	switch m.first[1] {
	case "/v1/chat/completions":
		if a := read(m.body); a.stream {
			return replyStream(conn, a)
		}
		return say(conn, 200, whole(read(m.body)))
	case "/v1/models":
		return say(conn, 200, []byte(fmt.Sprintf(`{"object":"list","data":[{"id":"%s","object":"model","created":%d,`+
			`"owned_by":"vllm","max_model_len":32768}]}`, model, time.Now().Unix())))
	case "/health", "/health_generate", "/readiness", "/liveness":
		return say(conn, 200, []byte(`{}`))
	case "/active":
		return say(conn, 200, []byte(fmt.Sprintf(`{"active":%d}`, atomic.LoadInt64(&active))))
	case "/get_model_info", "/model_info":
		return say(conn, 200, []byte(`{"model_path":"stub","tokenizer_path":"stub","is_generation":true}`))
	case "/get_server_info", "/server_info":
		return say(conn, 200, []byte(`{"model_path":"stub","served_model_name":"stub","tp_size":1,"dp_size":1}`))
	}
	return say(conn, 404, []byte(`{"error":{"message":"not found","type":"not_found_error","param":null,"code":404}}`))
}

func say(conn net.Conn, status int, body []byte) error {
	out := make([]byte, 0, len(body)+160)
	out = append(out, fmt.Sprintf("HTTP/1.1 %d OK\r\nserver: uvicorn\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n",
		status, len(body))...)
	_, err := conn.Write(append(out, body...))
	return err
}

const streamHead = "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n" +
	"transfer-encoding: chunked\r\n\r\n"

func replyStream(conn net.Conn, a asked) error {
	atomic.AddInt64(&active, 1)
	defer atomic.AddInt64(&active, -1)
	out := append(make([]byte, 0, 1024), streamHead...)
	err := play(a, func(event []byte) error {
		out = append(out, fmt.Sprintf("%x\r\n", len(event))...)
		out = append(append(out, event...), "\r\n"...)
		_, err := conn.Write(out)
		out = out[:0]
		return err
	})
	if err == nil {
		_, err = conn.Write([]byte("0\r\n\r\n"))
	}
	return err
}
