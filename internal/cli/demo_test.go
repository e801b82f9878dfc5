package cli

import (
	"net/netip"
	"strings"
	"testing"
)

func flowLines(t *testing.T, text string) []flowLine {
	t.Helper()
	var out []flowLine
	for s := range strings.Lines(text) {
		l, ok := parseFlowLine(s)
		if !ok {
			t.Fatalf("no flow record: %s", s)
		}
		out = append(out, l)
	}
	return out
}

// What a demo takes for proof in a flow log.
func TestRecorded(t *testing.T) {
	a := attempt{src: netip.MustParseAddr("10.0.0.6"), dst: netip.MustParseAddrPort("10.0.0.7:5432"), eni: "eni-db", direction: ingress, action: "REJECT"}
	const right = "eni-db ingress 10.0.0.6 10.0.0.7 6 5432 REJECT\n"
	for name, tt := range map[string]struct {
		text string
		ok   bool
	}{
		"there":               {right, true},
		"among others":        {"eni-x egress 10.0.0.6 10.0.0.9 6 80 ACCEPT\n" + right, true},
		"sent, too":           {"eni-app egress 10.0.0.6 10.0.0.7 6 5432 ACCEPT\n" + right, true},
		"not there":           {"", false},
		"accepted":            {"eni-db ingress 10.0.0.6 10.0.0.7 6 5432 ACCEPT\n", false},
		"another port":        {"eni-db ingress 10.0.0.6 10.0.0.7 6 5433 REJECT\n", false},
		"another protocol":    {"eni-db ingress 10.0.0.6 10.0.0.7 17 5432 REJECT\n", false},
		"the other way":       {"eni-db egress 10.0.0.6 10.0.0.7 6 5432 REJECT\n", false},
		"at another":          {"eni-app egress 10.0.0.6 10.0.0.7 6 5432 REJECT\n", false},
		"at another as well":  {right + "eni-app egress 10.0.0.6 10.0.0.7 6 5432 REJECT\n", false},
		"from somebody else":  {"eni-db ingress 10.0.0.8 10.0.0.7 6 5432 REJECT\n", false},
		"to somebody else":    {"eni-db ingress 10.0.0.6 10.0.0.8 6 5432 REJECT\n", false},
		"refused by somebody": {"eni-app ingress 10.0.0.6 10.0.0.7 6 5432 REJECT\n" + right, false},
	} {
		if why := recorded(a)(flowLines(t, tt.text)); (why == "") != tt.ok {
			t.Errorf("%s: %q", name, why)
		}
	}
}

func TestTunnelOnly(t *testing.T) {
	one, two := netip.MustParseAddr("10.0.0.4"), netip.MustParseAddr("10.0.16.4")
	const (
		there = "eni-1 egress 10.0.0.4 10.0.16.4 17 8472 ACCEPT\neni-2 ingress 10.0.0.4 10.0.16.4 17 8472 ACCEPT\n"
		back  = "eni-2 egress 10.0.16.4 10.0.0.4 17 8472 ACCEPT\n"
	)
	for name, tt := range map[string]struct {
		text string
		ok   bool
	}{
		"both ways":     {there + back, true},
		"one way":       {there, false},
		"nothing":       {"", false},
		"a pod as well": {there + back + "eni-1 egress 10.0.0.6 10.0.16.6 6 8080 ACCEPT\n", false},
		"another port":  {there + back + "eni-1 egress 10.0.0.4 10.0.16.4 17 53 ACCEPT\n", false},
		"refused":       {there + back + "eni-1 egress 10.0.0.4 10.0.16.4 17 8472 REJECT\n", false},
		"a third node":  {there + back + "eni-1 egress 10.0.0.4 10.0.16.9 17 8472 ACCEPT\n", false},
	} {
		if why := tunnelOnly(one, two)(flowLines(t, tt.text)); (why == "") != tt.ok {
			t.Errorf("%s: %q", name, why)
		}
	}
	for _, s := range []string{"", "eni-1 egress 10.0.0.4", "eni-1 egress - - - - NODATA", "TIME ACTION INTERFACE MACHINE WAY PROTO SOURCE"} {
		if l, ok := parseFlowLine(s); ok {
			t.Errorf("%q is %+v", s, l)
		}
	}
}

func TestWrap(t *testing.T) {
	for _, tt := range []struct {
		in    string
		width int
		want  string
	}{
		{"", 10, ""},
		{"one two three", 7, "one two|three"},
		{"one two three", 13, "one two three"},
		{"é é é", 3, "é é|é"},
		{"unbreakable x", 4, "unbreakable|x"},
	} {
		if got := strings.Join(wrap(tt.in, tt.width), "|"); got != tt.want {
			t.Errorf("wrap(%q, %d) = %q, want %q", tt.in, tt.width, got, tt.want)
		}
	}
}

// The comparison is taken in at one glance: it fits a terminal of 100 columns.
func TestSidesFit(t *testing.T) {
	var b strings.Builder
	d := &demo{out: &b}
	s := compared(netip.MustParseAddr("10.0.10.106"), netip.MustParseAddr("10.0.16.106"), netip.MustParseAddr("10.0.10.104"), netip.MustParseAddr("10.0.16.104"), "9001", "8951")
	s.print(d)
	lines := 0
	for line := range strings.Lines(b.String()) {
		lines++
		if n := len([]rune(strings.TrimRight(line, "\n"))); n > 100 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	if lines > 24 {
		t.Errorf("%d lines", lines)
	}
	if !strings.Contains(b.String(), "udp 8472") || !strings.Contains(b.String(), "tcp 8080") {
		t.Errorf("it does not say what the flow log sees:\n%s", b.String())
	}
}
