package differential

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd"
)

const childVariable = "UNDERLAY_DIFFERENTIAL_CHILD"

// childOptions are the Options that go to a child.
type childOptions struct {
	Name, Dir, BPFFS, Listen string
	FlowInterval             time.Duration // of records and files
}

// TestMain is a vpcd, when childVariable holds its Options: one that a test can
// kill.
func TestMain(m *testing.M) {
	options := os.Getenv(childVariable)
	if options == "" {
		os.Exit(m.Run())
	}
	var c childOptions
	err := json.Unmarshal([]byte(options), &c)
	if err == nil {
		err = vpcd.Run(context.Background(), vpcd.Options{
			Name: c.Name, Dir: c.Dir, BPFFS: c.BPFFS, Listen: c.Listen, FlowInterval: c.FlowInterval, FileInterval: c.FlowInterval,
			Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
			Ready:  func(a net.Addr) { fmt.Println(a) },
		})
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
