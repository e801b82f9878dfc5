// Command gen writes docs/reference/ec2-actions.md from the handlers that there
// are and the model of the API. It runs in the package's directory (go
// generate).
package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpcd/api"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

const page = "../../../docs/reference/ec2-actions.md"

func main() {
	log.SetFlags(0)
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() (err error) {
	dir, err := os.MkdirTemp("", "ec2-actions")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s, err := store.Open(filepath.Join(dir, "state.db"), store.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	var b bytes.Buffer
	write(&b, api.New(api.Options{Store: s, Chaos: chaos.New(nil)}).Handlers())
	return os.WriteFile(page, b.Bytes(), 0o644)
}

// write writes the page. Its parts are in the order of their names.
func write(w io.Writer, handlers map[string]query.Handler) {
	var whole, partial, absent []string
	for _, name := range slices.Sorted(maps.Keys(query.Actions)) {
		switch h, ok := handlers[name]; {
		case !ok:
			absent = append(absent, name)
		case len(h.Refused) > 0:
			partial = append(partial, name)
		default:
			whole = append(whole, name)
		}
	}
	fmt.Fprintf(w, `<!-- Written by internal/vpcd/api/gen. DO NOT EDIT: run make generate. -->
# vpcd: EC2 actions

Version %s of the EC2 API; of the %d actions that the model has for networks and instances, vpcd serves %d whole, %d in part, and %d not. A parameter that is not honoured is refused with `+"`UnsupportedOperation`"+` and its name, never ignored, but for those in the last table: nothing that can be seen here depends on them. What an object does to packets is in [vpcd.md](vpcd.md).

`, query.Version, len(query.Actions), len(whole), len(partial), len(absent))
	fmt.Fprintf(w, "## Whole\n%s\n\n", code(whole))
	fmt.Fprintln(w, "## In part\n| action | refused |\n|---|---|")
	for _, name := range partial {
		fmt.Fprintf(w, "| `%s` | %s |\n", name, code(handlers[name].Refused))
	}
	fmt.Fprintf(w, "\n`NAME≠VALUE`: only that value is accepted.\n\n## Absent\n%s\n\n", code(absent))
	fmt.Fprintf(w, "An absent action answers `InvalidAction`.\n\n## Accepted without effect\n| action | parameter | why |\n|---|---|---|\n")
	names := append([]string{"*"}, slices.Concat(whole, partial)...)
	slices.SortStableFunc(names, cmp.Compare[string])
	for _, name := range names {
		of := "`" + name + "`"
		if name == "*" {
			of = "all"
		}
		for _, i := range api.IgnoredBy(name) {
			fmt.Fprintf(w, "| %s | `%s` | %s |\n", of, i.Parameter, i.Why)
		}
	}
}

// code joins words for the page.
func code(words []string) string {
	if len(words) == 0 {
		return "none"
	}
	return "`" + strings.Join(words, "` `") + "`"
}
