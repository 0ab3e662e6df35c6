package main

import (
	"bytes"
	"fmt"
	"math/rand"
	"strconv"
	"time"
)

// model is the one that the stub has.
const model = "stub"

// asked is what a request says of its answer: the words "tokens=N rate=R" stand in the prompt, so that every gateway lets
// them through. rate is in tokens a second, 0 for all at once.
type asked struct {
	tokens        int
	rate          float64
	stream, usage bool
}

func read(body []byte) asked {
	return asked{
		tokens: int(number(body, "tokens=", 16)),
		rate:   number(body, "rate=", 0),
		stream: isTrue(body, `"stream"`),
		usage:  isTrue(body, `"include_usage"`),
	}
}

func number(body []byte, name string, otherwise float64) float64 {
	at := bytes.Index(body, []byte(name))
	if at < 0 {
		return otherwise
	}
	rest := body[at+len(name):]
	end := 0
	for end < len(rest) && (rest[end] >= '0' && rest[end] <= '9' || rest[end] == '.') {
		end++
	}
	value, err := strconv.ParseFloat(string(rest[:end]), 64)
	if err != nil {
		return otherwise
	}
	return value
}

func isTrue(body []byte, name string) bool {
	at := bytes.Index(body, []byte(name))
	return at >= 0 && bytes.HasPrefix(bytes.TrimLeft(body[at+len(name):], " :"), []byte("true"))
}

// whole is an answer in one piece.
func whole(a asked) []byte {
	out := make([]byte, 0, 512+8*a.tokens)
	out = append(out, fmt.Sprintf(`{"id":"%s","object":"chat.completion","created":%d,"model":"%s","choices":[{"index":0,`+
		`"message":{"role":"assistant","content":"`, newID(), time.Now().Unix(), model)...)
	for i := 0; i < a.tokens; i++ {
		out = append(out, " token"...)
	}
	return append(out, fmt.Sprintf(`","tool_calls":[]},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":32,`+
		`"total_tokens":%d,"completion_tokens":%d}}`, 32+a.tokens, a.tokens)...)
}

func newID() string {
	return fmt.Sprintf("chatcmpl-%016x%016x", rand.Uint64(), rand.Uint64())
}

// chunks makes the events of one streamed answer, in the shape in which vLLM sends them. A token's text is "@", the
// microsecond in which it is due (Unix time), and a space: whoever receives it knows how late it is.
type chunks struct {
	asked
	head string
	at   time.Time
}

func newChunks(a asked, now time.Time) *chunks {
	head := fmt.Sprintf(`data: {"id":"%s","object":"chat.completion.chunk","created":%d,"model":"%s","choices":[`,
		newID(), now.Unix(), model)
	return &chunks{a, head, now}
}

// due is when a token is to leave, by a schedule that forgives nothing.
func (c *chunks) due(token int) time.Time {
	if c.rate <= 0 {
		return c.at
	}
	return c.at.Add(time.Duration(float64(token) / c.rate * float64(time.Second)))
}

func (c *chunks) first(out []byte) []byte {
	out = append(out, c.head...)
	return append(out, `{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}`+"\n\n"...)
}

func (c *chunks) token(out []byte, due time.Time) []byte {
	out = append(out, c.head...)
	out = append(out, `{"index":0,"delta":{"content":"@`...)
	out = strconv.AppendInt(out, due.UnixMicro(), 10)
	return append(out, ` "},"logprobs":null,"finish_reason":null}]}`+"\n\n"...)
}

func (c *chunks) last(out []byte) []byte {
	out = append(out, c.head...)
	out = append(out, `{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"length"}]}`+"\n\n"...)
	if c.usage {
		out = append(out, c.head...)
		out = append(out, fmt.Sprintf(`],"usage":{"prompt_tokens":32,"total_tokens":%d,"completion_tokens":%d}}`+"\n\n",
			32+c.tokens, c.tokens)...)
	}
	return append(out, "data: [DONE]\n\n"...)
}

// play sends an answer's events through send, each when it is due, until one cannot be sent.
func play(a asked, send func([]byte) error) error {
	c := newChunks(a, time.Now())
	if err := send(c.first(nil)); err != nil {
		return err
	}
	buffer := make([]byte, 0, 512)
	for token := 0; token < a.tokens; token++ {
		due := c.due(token)
		until(due)
		if err := send(c.token(buffer[:0], due)); err != nil {
			return err
		}
	}
	return send(c.last(nil))
}
