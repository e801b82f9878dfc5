// Command gen writes the Go types of the EC2 Query API from model.json.
//
//	go run ./gen                  model.json → zz_*.go, in the working directory
//	go run ./gen -wire TABLE.md   first rebuild model.json from a wire table
package main

import (
	"flag"
	"fmt"
	"os"
)

func main() {
	wire := flag.String("wire", "", "rebuild model.json from this wire table first")
	model := flag.String("model", "model.json", "the model")
	flag.Parse()
	if err := run(*wire, *model); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

func run(wire, model string) error {
	if wire != "" {
		text, err := os.ReadFile(wire)
		if err != nil {
			return fmt.Errorf("read wire table: %w", err)
		}
		m, err := parseWire(string(text))
		if err != nil {
			return fmt.Errorf("parse %s: %w", wire, err)
		}
		if err := os.WriteFile(model, m.format(), 0o644); err != nil {
			return fmt.Errorf("write model: %w", err)
		}
	}
	m, err := readModel(model)
	if err != nil {
		return err
	}
	return generate(m, ".")
}
