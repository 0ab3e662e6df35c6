package main

import (
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
)

// tick is how exactly paced tokens leave. Go waits in whole milliseconds where nothing else happens, which would be
// half of what a good gateway adds.
const tick = 250 * time.Microsecond

var paced int64

// until sleeps until a moment, which may be over.
func until(due time.Time) {
	wait := time.Until(due)
	if wait <= 0 {
		return
	}
	atomic.AddInt64(&paced, 1)
	time.Sleep(wait)
	atomic.AddInt64(&paced, -1)
}

// keepTime looks at the timers every tick while somebody waits for one.
func keepTime() {
	runtime.LockOSThread()
	for {
		wait := syscall.NsecToTimespec(int64(tick))
		if atomic.LoadInt64(&paced) == 0 {
			wait = syscall.NsecToTimespec(int64(10 * tick))
		}
		_ = syscall.Nanosleep(&wait, nil)
		runtime.Gosched()
	}
}
