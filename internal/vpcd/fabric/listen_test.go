package fabric

import (
	"net"
	"testing"
)

// Whoever served a listener closes it too, after its interface or the fabric went.
func TestListenerClosedTwice(t *testing.T) {
	var l listening
	for _, end := range []func(){func() { l.close("eni-1") }, l.closeAll} {
		inner, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		outer := l.add("eni-1", inner)
		end()
		if err := outer.Close(); err == nil {
			t.Error("closing again gives no error")
		}
		if n := len(l.byENI); n > 0 {
			t.Errorf("%d interfaces without listeners are remembered", n)
		}
	}
}
