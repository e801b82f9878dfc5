package chaos

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

// The values of Settings.Throttle.
const (
	ThrottleAWS = "aws"
	ThrottleOff = "off"
)

// The values of Settings.Addresses.
const (
	AddressesLowest    = "lowest"
	AddressesScattered = "scattered"
)

// Settings say how badly vpcd behaves. The zero value, with Throttle "off" and
// Addresses "lowest", is good behaviour.
type Settings struct {
	Latency       time.Duration // added to each API call
	AttachLatency time.Duration // from AttachNetworkInterface to the link in the instance
	IMDSLag       time.Duration // IMDS tells what was true so long ago
	MappingLag    time.Duration // an address reaches its ENI on the wire so much later
	ReadLag       time.Duration // Describe calls tell what was true so long ago
	FlowInterval  time.Duration // a flow record is of so long at most; 0 is as vpcd was told at its start
	FileInterval  time.Duration // the files of flow logs are written so often; 0 is as vpcd was told at its start
	FreshReads    float64       // share of Describe calls that tell the present all the same, 0 to 1
	Throttle      string        // "aws" or "off"
	Addresses     string        // which free addresses and prefixes are given: "lowest" or "scattered"; "" is lowest
	Quotas        map[Quota]int // of the account, where they are not those that AWS gives to begin with
	Fail          []Failure     // the first that applies to a call fails it
}

// Failure makes calls of an action fail: the next Count of them, or each with
// a Probability. Exactly one of the two is set.
type Failure struct {
	Action      string  `json:"action"` // "*" is every action
	Code        string  `json:"code"`
	Count       int     `json:"count,omitempty"` // how many more
	Probability float64 `json:"probability,omitempty"`
}

// maxLag bounds all durations: beyond it a client sees a dead API, and vpcd
// would keep snapshots without end.
const maxLag = 10 * time.Minute

// maxFailures bounds the list that each call walks.
const maxFailures = 1000

// Defaults are the settings of a vpcd that nobody has touched.
func Defaults() Settings { return Settings{Throttle: ThrottleOff, Addresses: AddressesLowest} }

// durations lists the durations by their JSON names.
func (s *Settings) durations() map[string]*time.Duration {
	return map[string]*time.Duration{
		"latency": &s.Latency, "attachLatency": &s.AttachLatency, "imdsLag": &s.IMDSLag,
		"mappingLag": &s.MappingLag, "readLag": &s.ReadLag, "flowInterval": &s.FlowInterval, "fileInterval": &s.FileInterval,
	}
}

// Validate reports what is wrong with s: all of it.
func (s *Settings) Validate() error {
	var errs []error
	ds := s.durations()
	for _, name := range slices.Sorted(maps.Keys(ds)) {
		if d := *ds[name]; d < 0 || d > maxLag {
			errs = append(errs, fmt.Errorf("%s is %v: give a duration between 0 and %v", name, d, maxLag))
		}
	}
	for _, i := range []struct {
		name string
		d    time.Duration
	}{{"flowInterval", s.FlowInterval}, {"fileInterval", s.FileInterval}} {
		if i.d > 0 && i.d < time.Second {
			errs = append(errs, fmt.Errorf("%s is %v: give 1s or more, or 0 for what vpcd was told at its start", i.name, i.d))
		}
	}
	if !(s.FreshReads >= 0 && s.FreshReads <= 1) { // NaN is neither
		errs = append(errs, fmt.Errorf("freshReads is %v: give a share between 0 and 1", s.FreshReads))
	}
	if s.Throttle != ThrottleAWS && s.Throttle != ThrottleOff {
		errs = append(errs, fmt.Errorf("throttle is %q: give %q or %q", s.Throttle, ThrottleAWS, ThrottleOff))
	}
	if s.Addresses != "" && s.Addresses != AddressesLowest && s.Addresses != AddressesScattered {
		errs = append(errs, fmt.Errorf("addresses is %q: give %q or %q", s.Addresses, AddressesLowest, AddressesScattered))
	}
	errs = append(errs, s.validateQuotas()...)
	if len(s.Fail) > maxFailures {
		errs = append(errs, fmt.Errorf("there are %d failures: give at most %d", len(s.Fail), maxFailures))
	}
	for _, f := range s.Fail {
		errs = append(errs, f.validate())
	}
	return errors.Join(errs...)
}

func (f Failure) validate() error {
	switch {
	case f.Action != "*" && query.Actions[f.Action] == nil:
		return fmt.Errorf("failure %s: the EC2 API has no such action; name one as in AssignPrivateIpAddresses, or *", f)
	case f.Code == "" || strings.Trim(f.Code, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.") != "":
		return fmt.Errorf("failure %s: give an error code as in InternalError", f)
	case f.Count < 0 || f.Probability != f.Probability || f.Probability < 0 || f.Probability > 1,
		(f.Count > 0) == (f.Probability > 0):
		return fmt.Errorf("failure %s: give a count as in 3, or a probability as in 0.1", f)
	}
	return nil
}

// String is the form that ParseFailure reads.
func (f Failure) String() string {
	n := strconv.Itoa(f.Count)
	if f.Probability != 0 {
		n = strconv.FormatFloat(f.Probability, 'f', -1, 64)
		if !strings.Contains(n, ".") {
			n += ".0"
		}
	}
	return f.Action + "=" + f.Code + ":" + n
}

// ParseFailure reads ACTION=CODE:COUNT|PROBABILITY. What has a point is a
// probability: 1 is the next call, 1.0 is every call.
func ParseFailure(s string) (Failure, error) {
	action, rest, ok1 := strings.Cut(s, "=")
	code, number, ok2 := strings.Cut(rest, ":")
	if !ok1 || !ok2 {
		return Failure{}, fmt.Errorf("failure %q: write ACTION=CODE:COUNT or ACTION=CODE:PROBABILITY, as in AssignPrivateIpAddresses=InternalError:3 or *=RequestLimitExceeded:0.1", s)
	}
	f := Failure{Action: action, Code: code}
	var err error
	if strings.Contains(number, ".") {
		f.Probability, err = strconv.ParseFloat(number, 64)
	} else {
		f.Count, err = strconv.Atoi(number)
	}
	if err != nil {
		return Failure{}, fmt.Errorf("failure %q: %q is neither a count as in 3 nor a probability as in 0.1", s, number)
	}
	return f, f.validate()
}

// settingsJSON is the JSON form: durations are written as in "50ms".
type settingsJSON struct {
	Latency       string        `json:"latency"`
	AttachLatency string        `json:"attachLatency"`
	IMDSLag       string        `json:"imdsLag"`
	MappingLag    string        `json:"mappingLag"`
	ReadLag       string        `json:"readLag"`
	FlowInterval  string        `json:"flowInterval"`
	FileInterval  string        `json:"fileInterval"`
	FreshReads    float64       `json:"freshReads"`
	Throttle      string        `json:"throttle"`
	Addresses     string        `json:"addresses"`
	Quotas        map[Quota]int `json:"quotas"`
	Fail          []Failure     `json:"fail"`
}

// MarshalJSON writes durations as time.Duration prints them.
func (s Settings) MarshalJSON() ([]byte, error) {
	return json.Marshal(settingsJSON{
		Latency: s.Latency.String(), AttachLatency: s.AttachLatency.String(), IMDSLag: s.IMDSLag.String(),
		MappingLag: s.MappingLag.String(), ReadLag: s.ReadLag.String(), FlowInterval: s.FlowInterval.String(), FileInterval: s.FileInterval.String(), FreshReads: s.FreshReads,
		Throttle: s.Throttle, Addresses: cmp.Or(s.Addresses, AddressesLowest), Quotas: quotasJSON(s.Quotas), Fail: append([]Failure{}, s.Fail...),
	})
}

func quotasJSON(q map[Quota]int) map[Quota]int {
	if q == nil {
		return map[Quota]int{}
	}
	return q
}

// UnmarshalJSON reads what MarshalJSON writes. What is absent has its default;
// unknown names are errors. It does not Validate.
func (s *Settings) UnmarshalJSON(b []byte) error {
	var j settingsJSON
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&j); err != nil {
		return fmt.Errorf("decode chaos settings: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("decode chaos settings: there is more than one JSON value")
	}
	out := Settings{FreshReads: j.FreshReads, Throttle: cmp.Or(j.Throttle, ThrottleOff), Addresses: cmp.Or(j.Addresses, AddressesLowest), Quotas: j.Quotas, Fail: j.Fail}
	if len(out.Quotas) == 0 {
		out.Quotas = nil
	}
	ds := out.durations()
	for name, v := range map[string]string{
		"latency": j.Latency, "attachLatency": j.AttachLatency, "imdsLag": j.IMDSLag,
		"mappingLag": j.MappingLag, "readLag": j.ReadLag, "flowInterval": j.FlowInterval, "fileInterval": j.FileInterval,
	} {
		if v == "" {
			continue
		}
		d, err := time.ParseDuration(v)
		if err != nil {
			return fmt.Errorf("decode chaos settings: %s: %q is not a duration as in 50ms", name, v)
		}
		*ds[name] = d
	}
	*s = out
	return nil
}

// LongestLag is how far back anybody looks: for so long snapshots are kept.
func (s *Settings) LongestLag() time.Duration {
	return max(s.IMDSLag, s.MappingLag, s.ReadLag)
}
