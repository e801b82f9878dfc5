// Gen writes the IAM policy of a node: what the client of package ec2
// calls, and nothing else. It is run by go generate.
package main

import (
	"fmt"
	"os"
)

func main() {
	b, err := document(sources...)
	if err == nil {
		err = os.WriteFile("../../docs/reference/iam-policy.json", b, 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}
