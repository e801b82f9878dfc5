package nl

import (
	"runtime"
	"testing"
)

// A connection that waits for its next request holds no buffer: each pod of a
// burst has one open.
func TestIdleConnIsSmall(t *testing.T) {
	const n, most = 64, 4 << 10 // bytes of the heap for each
	heap := func() uint64 {
		for range 3 { // a pool keeps what is in it for a cycle more
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	conns := make([]*Conn, n)
	for i := range conns {
		c, err := Dial()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.LinkByName("lo"); err != nil {
			t.Fatal(err)
		}
		conns[i] = c
	}
	if after := heap(); after > before+n*most {
		t.Errorf("%d connections hold %d bytes each, want at most %d", n, (after-before)/n, most)
	}
	runtime.KeepAlive(conns)
}
