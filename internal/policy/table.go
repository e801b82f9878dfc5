package policy

import "maps"

// Tables is the policy of one endpoint in the form that the kernel's programs
// judge by.
type Tables struct {
	// By gate; nil: the gate does not judge the endpoint.
	Gates [Gates]*Table
	// Stack: see Endpoint.
	Stack bool
}

// Digest tells tables apart: equal ones judge alike, rule for rule.
type Digest [16]byte

// Table is one gate of an endpoint, as doc.go describes it. It must not be
// changed: endpoints share it.
type Table struct {
	// Cells, each of CellSize bytes, little-endian. The first has the layout's
	// version, room for an epoch, which is 0, and the Digest; the second
	// describes egress, the third ingress.
	Cells  []byte
	Digest Digest
}

// Rules are the names of the rules that verdicts may bear.
type Rules map[RuleID]string

// Name returns a rule's name, of the ids that stand for none as well; of an
// unknown one "".
func (r Rules) Name(id RuleID) string {
	switch id {
	case NoRule:
		return "no policy"
	case RuleHost:
		return "the node itself"
	case RuleSelf:
		return "the pod itself"
	}
	return r[id]
}

// Clone returns a copy.
func (r Rules) Clone() Rules { return maps.Clone(r) }
