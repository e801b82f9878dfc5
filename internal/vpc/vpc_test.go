package vpc

import (
	"net/netip"
	"testing"
)

func TestLimitsOfKnownTypes(t *testing.T) {
	for _, want := range []struct {
		typ                   string
		enis, ipv4, maxPodsIP int
		nitro                 bool
	}{
		{"m5.large", 3, 10, 29, true},
		{"t3.small", 3, 4, 11, true},
		{"m6i.4xlarge", 8, 30, 234, true},
		{"m4.large", 2, 10, 20, false},
	} {
		l, ok := LimitsOf(want.typ)
		if !ok {
			t.Fatalf("%s: unknown", want.typ)
		}
		if l.ENIs != want.enis || l.IPv4PerENI != want.ipv4 || l.Nitro() != want.nitro {
			t.Errorf("%s: %d ENIs × %d, nitro %v; want %d × %d, %v", want.typ, l.ENIs, l.IPv4PerENI, l.Nitro(), want.enis, want.ipv4, want.nitro)
		}
		if got := l.ENIs*(l.IPv4PerENI-1) + 2; got != want.maxPodsIP {
			t.Errorf("%s: max pods %d, want %d", want.typ, got, want.maxPodsIP)
		}
	}
	if n := len(InstanceTypes()); n < 1000 {
		t.Errorf("only %d instance types", n)
	}
}

func TestCheckID(t *testing.T) {
	for id, ok := range map[string]bool{
		NewID("eni"):                 true,
		"eni-0123abcd":               true,
		"eni-0123456789abcdef":       false, // 16 digits
		"eni-0123456789abcdeg0":      false,
		"vpc-0123456789abcdef0":      false,
		"eni-attach-0123456789abcd0": false,
		"":                           false,
	} {
		if err := CheckID("eni", id); (err == nil) != ok {
			t.Errorf("CheckID(eni, %q) = %v", id, err)
		}
	}
}

func TestENIHolds(t *testing.T) {
	e := ENI{
		Primary:   netip.MustParseAddr("10.0.0.4"),
		Secondary: []netip.Addr{netip.MustParseAddr("10.0.0.9")},
		Prefixes:  []netip.Prefix{netip.MustParsePrefix("10.0.0.32/28")},
	}
	for a, want := range map[string]bool{"10.0.0.4": true, "10.0.0.9": true, "10.0.0.32": true, "10.0.0.47": true, "10.0.0.48": false, "10.0.0.5": false} {
		if got := e.Holds(netip.MustParseAddr(a)); got != want {
			t.Errorf("Holds(%s) = %v", a, got)
		}
	}
}

func TestGroupSetIsCanonical(t *testing.T) {
	a := NewGroupSet([]SecurityGroupID{"sg-b", "sg-a", "sg-b"})
	if b := NewGroupSet([]SecurityGroupID{"sg-a", "sg-b"}); a != b || a != "sg-a,sg-b" {
		t.Errorf("%q and %q", a, b)
	}
	if got := a.Groups(); len(got) != 2 || got[0] != "sg-a" {
		t.Errorf("Groups() = %v", got)
	}
	if NewGroupSet(nil).Groups() != nil {
		t.Error("the empty set has members")
	}
}

func TestRouter(t *testing.T) {
	if got := Router(netip.MustParsePrefix("10.0.16.0/20")); got != netip.MustParseAddr("10.0.16.1") {
		t.Errorf("Router = %v", got)
	}
}
