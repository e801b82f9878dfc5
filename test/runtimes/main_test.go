package runtimes

import (
	"os"
	"testing"

	"github.com/underlay-cni/underlay/test/lab"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(m)) }
