package vpcmodel

import (
	"strings"
	"testing"
)

// Each fact's script gives the verdicts that it names.
func TestFacts(t *testing.T) {
	_, facts, err := Facts()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range facts {
		if f.Script == nil {
			continue
		}
		t.Run(f.Name, func(t *testing.T) {
			script := append(append(Script{}, f.Base...), f.Script...)
			verdicts, _, err := script.Run(Defaults())
			if err != nil {
				t.Fatal(err)
			}
			for i, st := range script {
				if send, ok := st.(Send); ok && !verdicts[i].Fits(send.Want) {
					t.Errorf("%s\n%s\n  is %s", f.Sentence, st, verdicts[i])
				}
			}
		})
	}
}

// A script that is printed and read again is the same.
func TestTextRoundTrip(t *testing.T) {
	base, facts, err := Facts()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range append(facts, Fact{Name: "base", Script: base}) {
		text := f.Script.String()
		again, err := Parse(text)
		if err != nil {
			t.Errorf("%s: %v", f.Name, err)
		} else if again.String() != text {
			t.Errorf("%s reads\n%s\nafter\n%s", f.Name, again, text)
		}
	}
}

func TestParseSaysWhatIsWrong(t *testing.T) {
	for line, want := range map[string]string{
		"subnet s1 v1 10.0.0.0/33":                        "prefix length out of range",
		"subnet s1 v1":                                    "ends too early",
		"eat s1":                                          `"eat" is no statement`,
		"check e1 off now":                                `"now" is too much`,
		"allow g1 up tcp 80 10.0.0.0/8":                   `"up" is neither in nor out`,
		"allow g1 in tcp x 10.0.0.0/8":                    `"x" is no range of ports`,
		"send 1 e1 tcp 10.0.0.4:1 > 10.0.0.5:2 SQ":        "none of the flags",
		"send 1 e1 tcp 10.0.0.4:1 10.0.0.5:2 S":           "want >",
		"route t1 10.0.0.0/8 cow i1":                      "want eni, peer, igw or nat",
		"send 1 e1 banana 10.0.0.4 > 10.0.0.5":            "is no protocol",
		"send one e1 tcp 10.0.0.4:1 > 10.0.0.5:2 S":       "is not a number",
		"send 1 e1 icmp 10.0.0.4 > 10.0.0.5 x/0 ident 1":  "neither a number nor any",
		"send 1 e1 icmp 10.0.0.4 > 10.0.0.5 8/0 ident 1 ": "",
	} {
		_, err := Parse("\n" + line)
		switch {
		case want == "" && err != nil:
			t.Errorf("%q: %v", line, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "line 2")):
			t.Errorf("%q: %v, want %q and the line", line, err, want)
		}
	}
}

// What EC2 refuses has no place in a world.
func TestApplyRefuses(t *testing.T) {
	base, _, err := Facts()
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"group g1 v1":                                                    "already",
		"groups e9 g1":                                                   "another VPC",
		"subnet s5 v7 10.0.0.0/24":                                       "no VPC v7",
		"eni e5 s1 i5 10.0.1.33":                                         "is e2's",
		"eni e5 s1 i5 10.0.2.33":                                         "not in subnet",
		"allow g1 in all group g8":                                       "no group g8",
		"revoke g1 in all 10.0.0.0/8":                                    "no such rule",
		"delete g1":                                                      "carries",
		"table t1 v1\nroute t1 10.0.1.0/25 eni e1":                       "within the local route",
		"table t1 v1\nroute t1 169.254.169.0/24 eni e1":                  "refused",
		"table t1 v1\nroute t1 10.1.0.0/16 eni e9":                       "another VPC",
		"table t1 v1\nroute t1 10.1.0.0/16 peer x1":                      "no peering",
		"peer x1 v1 v9\ntable t1 v1\nroute t1 10.1.0.0/16 peer x1":       "has failed",
		"acl a1 v1\nentry a1 in 1 allow all 0.0.0.0/0\nunentry a1 out 1": "no entry 1",
		"vpc v6 10.6.0.0/16 2001:db8:6::/56\nsubnet s6 v6 10.6.1.0/24 2001:db8:6:1::/64\neni e6 s6 i6 10.6.1.4 2001:db8:6:2::4":     "not in subnet",
		"vpc v6 10.6.0.0/16 2001:db8:6::/56\ntable t1 v6\nroute t1 2001:db8:6:1::/64 eni e1":                                        "another VPC",
		"table t1 v1\nroute t1 fd00:ec2:1::/48 eni e1":                                                                              "refused",
		"vpc v6 10.6.0.0/16 2001:db8:6::/56\nvpc v7 10.7.0.0/16 2001:db8:6::/56\npeer x1 v6 v7\ntable t1 v6\nroute t1 ::/0 peer x1": "has failed",
		"send 1 e7 udp 10.0.0.4:1 > 10.0.0.5:2":                                                                                     "no interface e7",
	} {
		s, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = append(append(Script{}, base...), s...).Run(Defaults())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// An instance over its allowance tracks no new flow; what it tracks goes on, and
// what needs no tracking passes.
func TestAllowance(t *testing.T) {
	s, err := Parse(`
vpc v1 10.0.0.0/16
subnet s1 v1 10.0.1.0/24
eni e1 s1 i1 10.0.1.10
eni e2 s1 i2 10.0.1.20
group g1 v1
group g2 v1
groups e1 g1
groups e2 g2
allow g1 out all 0.0.0.0/0
allow g1 in all 0.0.0.0/0
allow g2 in udp 53 10.0.0.0/16
send 1 e1 udp 10.0.1.10:5000 > 10.0.1.20:53 => e2 untracked tracked
send 2 e1 udp 10.0.1.10:5001 > 10.0.1.20:53 => e2 untracked tracked
send 3 e1 udp 10.0.1.10:5002 > 10.0.1.20:53 => drop ingress
send 4 e1 udp 10.0.1.10:5001 > 10.0.1.20:53 => e2
wait 30s
send 5 e1 udp 10.0.1.10:5002 > 10.0.1.20:53 => e2
`)
	if err != nil {
		t.Fatal(err)
	}
	settings := Defaults()
	settings.MaxTracked = 2
	checkScript(t, s, settings)
}

func checkScript(t *testing.T, s Script, settings Settings) {
	t.Helper()
	verdicts, _, err := s.Run(settings)
	if err != nil {
		t.Fatal(err)
	}
	for i, st := range s {
		if send, ok := st.(Send); ok && !verdicts[i].Fits(send.Want) {
			t.Errorf("%s\n  is %s", st, verdicts[i])
		}
	}
}
