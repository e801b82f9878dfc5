// Command underlay builds labs, runs pods in them and shows what is there; and
// it simulates what no lab can hold.
package main

import (
	"os"

	"github.com/underlay-cni/underlay/internal/cli"
)

func main() { os.Exit(cli.Main(os.Args[1:], simCommand)) }
