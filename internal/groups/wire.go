package groups

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// protocolVersion is that of both sides' messages.
const protocolVersion = 1

const (
	// maxNeed bounds a message that says what is needed, and maxGroups the groups
	// in it: the largest instance has 15 interfaces of 5 groups each, and as many
	// sets of mode host as it has pods.
	maxNeed   = 256 << 10
	maxGroups = 8192
	// maxUpdate bounds what a poller tells at once. A group has some hundred rules
	// of 200 bytes, and a member 20.
	maxUpdate = 64 << 20
)

// needMessage is what a book sends.
type needMessage struct {
	Version int                   `json:"version"`
	Groups  []vpc.SecurityGroupID `json:"groups"`
	Members bool                  `json:"members,omitempty"`
}

// update is what a poller sends: what has changed since the one before.
type update struct {
	Version int    `json:"version"`
	Number  uint64 `json:"number"`            // 1, 2, … of the connection; with 1 nothing is known
	Refused string `json:"refused,omitempty"` // why the connection ends, and what to do

	Groups     map[vpc.SecurityGroupID][]wireRule  `json:"groups,omitempty"` // with all their rules
	GroupsGone []vpc.SecurityGroupID               `json:"groupsGone,omitempty"`
	Lists      map[vpc.PrefixListID]wireList       `json:"lists,omitempty"`
	ListsGone  []vpc.PrefixListID                  `json:"listsGone,omitempty"`
	Members    map[vpc.SecurityGroupID]wireMembers `json:"members,omitempty"`
	// MembersGone are groups whose members are no longer told.
	MembersGone []vpc.SecurityGroupID `json:"membersGone,omitempty"`

	AgeMillis   *int64     `json:"ageMillis,omitempty"` // since the last read that succeeded; nil: there was none
	EveryMillis int64      `json:"everyMillis"`
	Error       *wireError `json:"error,omitempty"` // of the last read
}

type wireRule struct {
	ID         string              `json:"id"`
	Egress     bool                `json:"egress,omitempty"`
	Protocol   int                 `json:"protocol"`
	FromPort   int                 `json:"fromPort"`
	ToPort     int                 `json:"toPort"`
	CIDR       netip.Prefix        `json:"cidr,omitzero"`
	PrefixList vpc.PrefixListID    `json:"prefixList,omitempty"`
	Group      vpc.SecurityGroupID `json:"group,omitempty"`
}

type wireList struct {
	Version int64          `json:"version"`
	Entries []netip.Prefix `json:"entries"`
}

// wireMembers is the difference to those told before.
type wireMembers struct {
	Add    []netip.Prefix `json:"add,omitempty"`
	Remove []netip.Prefix `json:"remove,omitempty"`
}

type wireError struct {
	Class   string `json:"class"`
	Message string `json:"message"`
}

// The classes of errors that make a difference to who is told.
var classNames = map[ipam.Class]string{ipam.ClassThrottled: "throttled", ipam.ClassDenied: "denied", ipam.ClassUnavailable: "unavailable"}

// Error is what a poller elsewhere says of its last read.
type Error struct {
	Class   ipam.Class
	Message string
}

func (e *Error) Error() string { return e.Message }

// ClassOf returns what kind of failure an error of a read is, here or elsewhere.
func ClassOf(err error) ipam.Class {
	var e *Error
	if errors.As(err, &e) {
		return e.Class
	}
	_, class := ec2.Outcome(err)
	return class
}

func (e *wireError) error() error {
	if e == nil {
		return nil
	}
	out := &Error{Message: e.Message}
	for c, name := range classNames {
		if name == e.Class {
			out.Class = c
		}
	}
	return out
}

// add puts a status into the message.
func (u *update) add(s Status, now time.Time) {
	u.EveryMillis = s.Every.Milliseconds()
	if !s.Read.IsZero() {
		age := now.Sub(s.Read).Milliseconds()
		u.AgeMillis = &age
	}
	if s.Err != nil {
		u.Error = &wireError{Class: classNames[ClassOf(s.Err)], Message: s.Err.Error()}
	}
}

// status is what the message says of the poller's reads.
func (u *update) status(now time.Time) Status {
	s := Status{Every: time.Duration(u.EveryMillis) * time.Millisecond, Err: u.Error.error()}
	if u.AgeMillis != nil {
		s.Read = now.Add(-time.Duration(*u.AgeMillis) * time.Millisecond)
	}
	return s
}

// between is what makes now of before.
func between(before, now *Snapshot) *update {
	u := &update{}
	for id, g := range now.Groups {
		if before.Groups[id] == g {
			continue
		}
		rules := make([]wireRule, len(g.Rules))
		for i, r := range g.Rules {
			rules[i] = wireRule{ID: r.ID, Egress: r.Egress, Protocol: r.Protocol, FromPort: r.FromPort, ToPort: r.ToPort, CIDR: r.CIDR, PrefixList: r.PrefixList, Group: r.Referenced}
		}
		put(&u.Groups, id, rules)
	}
	for id, l := range now.Lists {
		if before.Lists[id] != l {
			put(&u.Lists, id, wireList{l.Version, l.Entries})
		}
	}
	for id, m := range now.Members {
		was := before.Members[id]
		if was == m {
			continue
		}
		if was == nil {
			was = &Membership{}
		}
		put(&u.Members, id, difference(was.Addrs, m.Addrs))
	}
	u.GroupsGone, u.ListsGone, u.MembersGone = gone(before.Groups, now.Groups), gone(before.Lists, now.Lists), gone(before.Members, now.Members)
	return u
}

func put[K comparable, V any](m *map[K]V, k K, v V) {
	if *m == nil {
		*m = map[K]V{}
	}
	(*m)[k] = v
}

func gone[K ~string, V any](before, now map[K]V) (out []K) {
	for id := range before {
		if _, ok := now[id]; !ok {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// difference is between two sorted lists.
func difference(before, now []netip.Prefix) (d wireMembers) {
	for len(before) > 0 || len(now) > 0 {
		c := 0
		switch {
		case len(before) == 0:
			c = 1
		case len(now) == 0:
			c = -1
		default:
			c = before[0].Compare(now[0])
		}
		switch {
		case c < 0:
			d.Remove, before = append(d.Remove, before[0]), before[1:]
		case c > 0:
			d.Add, now = append(d.Add, now[0]), now[1:]
		default:
			before, now = before[1:], now[1:]
		}
	}
	return d
}

// apply returns what before becomes by u. An error says what makes no sense in u.
func (u *update) apply(before *Snapshot) (*Snapshot, error) {
	now := &Snapshot{Groups: maps.Clone(before.Groups), Lists: maps.Clone(before.Lists), Members: maps.Clone(before.Members)}
	for _, id := range u.GroupsGone {
		delete(now.Groups, id)
	}
	for _, id := range u.ListsGone {
		delete(now.Lists, id)
	}
	for _, id := range u.MembersGone {
		delete(now.Members, id)
	}
	for id, rules := range u.Groups {
		g := &Group{Rules: make([]vpc.SecurityGroupRule, 0, len(rules))}
		for _, r := range rules {
			if err := r.check(); err != nil {
				return nil, fmt.Errorf("rule %q of %q: %w", r.ID, id, err)
			}
			g.Rules = append(g.Rules, vpc.SecurityGroupRule{ID: r.ID, Group: id, Egress: r.Egress, Protocol: r.Protocol, FromPort: r.FromPort, ToPort: r.ToPort, CIDR: r.CIDR, PrefixList: r.PrefixList, Referenced: r.Group})
		}
		if id == "" {
			return nil, errors.New("a group without an ID")
		}
		now.Groups[id] = g
	}
	for id, l := range u.Lists {
		if err := checkPrefixes(l.Entries); err != nil {
			return nil, fmt.Errorf("prefix list %q: %w", id, err)
		}
		now.Lists[id] = &PrefixList{Version: l.Version, Entries: l.Entries}
	}
	for id, d := range u.Members {
		if err := checkPrefixes(d.Add); err != nil {
			return nil, fmt.Errorf("members of %q: %w", id, err)
		}
		leave := make(map[netip.Prefix]bool, len(d.Remove))
		for _, p := range d.Remove {
			leave[p] = true
		}
		m := &Membership{}
		if was := now.Members[id]; was != nil {
			m.Addrs = slices.DeleteFunc(slices.Clone(was.Addrs), func(p netip.Prefix) bool {
				was := leave[p]
				delete(leave, p)
				return was
			})
		}
		for p := range leave {
			return nil, fmt.Errorf("%s leaves %q, where it is not", p, id)
		}
		m.Addrs = append(m.Addrs, d.Add...)
		slices.SortFunc(m.Addrs, netip.Prefix.Compare)
		m.Addrs = slices.Compact(m.Addrs)
		now.Members[id] = m
	}
	return now, nil
}

func (r *wireRule) check() error {
	switch {
	case r.ID == "":
		return errors.New("it has no ID")
	case r.Protocol < -1 || r.Protocol > 255:
		return fmt.Errorf("protocol %d", r.Protocol)
	case r.FromPort < -1 || r.FromPort > 65535 || r.ToPort < -1 || r.ToPort > 65535:
		return fmt.Errorf("ports %d to %d", r.FromPort, r.ToPort)
	case r.CIDR.IsValid() && r.CIDR != r.CIDR.Masked():
		return fmt.Errorf("%s is no range", r.CIDR)
	}
	return nil
}

func checkPrefixes(list []netip.Prefix) error {
	for _, p := range list {
		if !p.IsValid() || p != p.Masked() {
			return fmt.Errorf("%s is no range", p)
		}
	}
	return nil
}

// need returns what a book's message says.
func (m *needMessage) need() (Need, error) {
	if m.Version != protocolVersion {
		return Need{}, fmt.Errorf("the poller speaks protocol version %d, the agent %d; install those of one release", protocolVersion, m.Version)
	}
	if len(m.Groups) > maxGroups {
		return Need{}, fmt.Errorf("%d security groups are asked for, at most %d can be", len(m.Groups), maxGroups)
	}
	n := Need{Groups: slices.Clone(m.Groups), Members: m.Members}
	slices.Sort(n.Groups)
	n.Groups = slices.Compact(n.Groups)
	for _, id := range n.Groups {
		// What EC2 would refuse would refuse the others' with it.
		if !strings.HasPrefix(string(id), "sg-") || len(id) > 64 || strings.Trim(string(id[3:]), "0123456789abcdef") != "" {
			return Need{}, fmt.Errorf("%q is no ID of a security group", id)
		}
	}
	return n, nil
}

const headerLen = 4

// send writes one message.
func send(w io.Writer, msg any) error {
	b := make([]byte, headerLen, 512)
	body, err := json.Marshal(msg)
	if err != nil {
		return err
	}
	if len(body) > maxUpdate {
		return fmt.Errorf("a message of %d bytes, at most %d can be sent", len(body), maxUpdate)
	}
	binary.BigEndian.PutUint32(b, uint32(len(body)))
	_, err = w.Write(append(b, body...))
	return err
}

// receive reads one message of at most limit bytes. The buffer grows with what
// arrives, so that a length alone costs no memory.
func receive(r io.Reader, limit uint32, msg any) error {
	var header [headerLen]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(header[:])
	if n > limit {
		return fmt.Errorf("a message of %d bytes is announced, at most %d can be", n, limit)
	}
	b, err := io.ReadAll(io.LimitReader(r, int64(n)))
	if err != nil {
		return err
	}
	if len(b) < int(n) {
		return io.ErrUnexpectedEOF
	}
	if err := json.Unmarshal(b, msg); err != nil {
		return fmt.Errorf("decode a message: %w", err)
	}
	return nil
}
