// Stub is what stands around a gateway under measurement, so cheap that it is never the limit: a model server, workers
// of an RMA pool, and the load. Each is a command of its own:
//
//	stub backend -listen HOST:PORT              OpenAI's API with made-up tokens
//	stub worker                                 workers of a pool; who they are comes as JSON lines on stdin
//	stub requests -url URL -body JSON …         whole answers, as many as come
//	stub streams -url URL -body JSON …          streamed answers, and how late each token is
//
// A load says "begin" and "end" on stdout around what counts, so that whoever started it can read the gateway's CPU, and
// then one line of JSON.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	commands := map[string]func([]string) error{
		"backend": backend, "worker": worker, "requests": requests, "streams": streams,
	}
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fail(fmt.Errorf("usage: stub backend|worker|requests|streams"))
	}
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-told
		os.Exit(0)
	}()
	if err := commands[os.Args[1]](os.Args[2:]); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
