package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// format is the layout of the file. A store opens what it wrote itself, and
// refuses what a newer one did.
//
//	1  VPCs, subnets, instances, interfaces, security groups, services
//	2  also route tables, network ACLs and all that routes lead to
//	3  also IPv6: blocks of VPCs and subnets, addresses, egress-only gateways
const (
	format       = 3
	oldestFormat = 1
)

const (
	bucketMeta        = "meta"
	bucketVPC         = "vpc"
	bucketSubnet      = "subnet"
	bucketReservation = "reservation"
	bucketInstance    = "instance"
	bucketENI         = "eni"
	bucketGroup       = "group"
	bucketService     = "service"
	bucketRouteTable  = "routetable"
	bucketACL         = "acl"
	bucketGateway     = "igw"
	bucketEgressOnly  = "eigw"
	bucketAddress     = "address"
	bucketNAT         = "nat"
	bucketPeering     = "peering"
	bucketPrefixList  = "prefixlist"
	bucketDHCP        = "dhcp"
	bucketFlowLog     = "flowlog"
	bucketTags        = "tags"
	bucketToken       = "token"

	keyFormat  = "format"
	keyLastVNI = "lastVNI"
)

var buckets = []string{bucketMeta, bucketVPC, bucketSubnet, bucketReservation, bucketInstance, bucketENI, bucketGroup, bucketService, bucketTags, bucketToken,
	bucketRouteTable, bucketACL, bucketGateway, bucketEgressOnly, bucketAddress, bucketNAT, bucketPeering, bucketPrefixList, bucketDHCP, bucketFlowLog}

// Store is the store.
type Store struct {
	db  *bbolt.DB
	now func() time.Time

	current atomic.Pointer[State]
	changed chan struct{} // the one that Changed returns

	updating sync.Mutex // held for the length of an update

	mu   sync.Mutex
	past []*State // snapshots older than current, oldest first
	keep func() time.Duration
	subs []chan struct{}
}

// Options of Open; the zero value is usable.
type Options struct {
	Now func() time.Time // time.Now when nil
}

// Open opens or makes the file and reads all of it.
func Open(path string, o Options) (*Store, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout:        2 * time.Second,
		NoSync:         true,
		NoGrowSync:     true,
		NoFreelistSync: true,
		FreelistType:   bbolt.FreelistMapType,
	})
	if err != nil {
		if errors.Is(err, bolterrors.ErrTimeout) {
			return nil, fmt.Errorf("open %s: another process has it open; stop that vpcd, or give this one a directory of its own", path)
		}
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	s := &Store{db: db, now: o.Now, changed: make(chan struct{}, 1)}
	state, err := s.load()
	if err != nil {
		_ = db.Close() // the reason why it could not be read says more
		return nil, fmt.Errorf("read %s: %w", filepath.Base(path), err)
	}
	s.current.Store(state)
	return s, nil
}

// Close closes the file. Snapshots stay readable.
func (s *Store) Close() error { return s.db.Close() }

// View returns the newest snapshot.
func (s *Store) View() *State { return s.current.Load() }

// KeepHistory makes the store keep snapshots for as long as age says; it is
// asked at each update. Without it none but the newest is kept.
func (s *Store) KeepHistory(age func() time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keep = age
}

// At returns the snapshot that was the newest at time t: of those kept, the
// last not younger than t, or the oldest there is.
func (s *Store) At(t time.Time) *State {
	cur := s.View()
	if !cur.Time.After(t) {
		return cur
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.past) - 1; i >= 0; i-- {
		if !s.past[i].Time.After(t) {
			return s.past[i]
		}
	}
	if len(s.past) > 0 {
		return s.past[0]
	}
	return cur
}

// Changed returns a channel that holds a value when there has been an update
// since it was last received from. It is always the same channel and has one
// reader; others Subscribe.
func (s *Store) Changed() <-chan struct{} { return s.changed }

// Subscribe returns a channel like that of Changed for one more reader. It
// lives as long as the store.
func (s *Store) Subscribe() <-chan struct{} {
	c := make(chan struct{}, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.subs = append(s.subs, c)
	return c
}

// Update runs fn on a transaction, commits it to the file and publishes the
// result. When fn returns an error, or what it did cannot be committed, nothing
// has changed; the error of fn comes back as it is.
func (s *Store) Update(fn func(*Tx) error) error {
	s.updating.Lock()
	defer s.updating.Unlock()
	cur := s.View()
	tx := &Tx{State: *cur}
	if err := fn(tx); err != nil {
		return err
	}
	if tx.err != nil {
		return tx.err
	}
	if len(tx.writes) == 0 {
		return nil
	}
	if err := s.commit(tx.writes); err != nil {
		return fmt.Errorf("commit to the state file: %w", err)
	}
	next := tx.State
	next.Seq++
	next.Time = s.now()
	s.publish(cur, &next)
	return nil
}

func (s *Store) publish(cur, next *State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var age time.Duration
	if s.keep != nil {
		age = s.keep()
	}
	if age > 0 {
		s.past = append(s.past, cur)
		// The last snapshot at or before the horizon is still the answer to it.
		horizon, drop := next.Time.Add(-age), 0
		for drop+1 < len(s.past) && !s.past[drop+1].Time.After(horizon) {
			drop++
		}
		clear(s.past[:drop])
		s.past = s.past[drop:]
	} else {
		s.past = nil
	}
	s.current.Store(next)
	notify(s.changed)
	for _, c := range s.subs {
		notify(c)
	}
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // there is one already
	}
}

func (s *Store) commit(writes []write) error {
	return s.db.Update(func(b *bbolt.Tx) error { return writeAll(b, writes) })
}

// writeAll writes to the buckets.
func writeAll(b *bbolt.Tx, writes []write) error {
	for _, w := range writes {
		bucket := b.Bucket([]byte(w.bucket))
		if w.value == nil {
			if err := bucket.Delete([]byte(w.key)); err != nil {
				return fmt.Errorf("delete %s %s: %w", w.bucket, w.key, err)
			}
			continue
		}
		v, err := json.Marshal(w.value)
		if err != nil {
			return fmt.Errorf("encode %s %s: %w", w.bucket, w.key, err)
		}
		if err := bucket.Put([]byte(w.key), v); err != nil {
			return fmt.Errorf("put %s %s: %w", w.bucket, w.key, err)
		}
	}
	return nil
}

// load makes the buckets that are missing and reads everything.
func (s *Store) load() (*State, error) {
	tx := &Tx{State: *emptyState(s.now())}
	err := s.db.Update(func(b *bbolt.Tx) error {
		for _, name := range buckets {
			if _, err := b.CreateBucketIfNotExists([]byte(name)); err != nil {
				return fmt.Errorf("make bucket %s: %w", name, err)
			}
		}
		meta := b.Bucket([]byte(bucketMeta))
		have := format
		if v := meta.Get([]byte(keyFormat)); v != nil {
			if err := json.Unmarshal(v, &have); err != nil {
				return fmt.Errorf("decode the format: %w", err)
			}
		}
		if have < oldestFormat || have > format {
			return fmt.Errorf("its format is %d, this vpcd knows %d to %d; use the vpcd that wrote it, or remove the file", have, oldestFormat, format)
		}
		if err := meta.Put([]byte(keyFormat), []byte(fmt.Sprint(format))); err != nil {
			return fmt.Errorf("put the format: %w", err)
		}
		if v := meta.Get([]byte(keyLastVNI)); v != nil {
			if err := json.Unmarshal(v, &tx.lastVNI); err != nil {
				return fmt.Errorf("decode the last VNI: %w", err)
			}
		}
		if err := tx.loadTables(b); err != nil {
			return err
		}
		// What older files lack.
		for _, v := range tx.VPCs.All() {
			tx.addDefaults(v)
		}
		for _, n := range tx.Subnets.All() {
			tx.addDefaultACL(n)
		}
		if tx.err != nil {
			return tx.err
		}
		return writeAll(b, tx.writes)
	})
	if err != nil {
		return nil, err
	}
	return &tx.State, tx.err
}

func (t *Tx) loadTables(b *bbolt.Tx) error {
	// Subnets stand before what is in their address space.
	return errors.Join(
		each(b, bucketVPC, func(_ string, v *VPC) { t.VPCs = t.VPCs.with(v.ID, v) }),
		each(b, bucketSubnet, func(_ string, v *Subnet) { t.addSubnet(v) }),
		each(b, bucketReservation, func(_ string, v *Reservation) { t.addReservation(v) }),
		each(b, bucketInstance, func(_ string, v *Instance) { t.addInstance(v) }),
		each(b, bucketENI, func(_ string, v *ENI) { t.addENI(v) }),
		each(b, bucketGroup, func(_ string, v *Group) { t.Groups = t.Groups.with(v.ID, v) }),
		each(b, bucketService, func(_ string, v *Service) { t.Services = t.Services.with(v.Name, v) }),
		each(b, bucketRouteTable, func(_ string, v *RouteTable) { t.addRouteTable(v) }),
		each(b, bucketACL, func(_ string, v *NetworkACL) { t.addACL(v) }),
		each(b, bucketGateway, func(_ string, v *InternetGateway) { t.addGateway(v) }),
		each(b, bucketEgressOnly, func(_ string, v *EgressOnlyGateway) { t.EgressOnlyGateways = t.EgressOnlyGateways.with(v.ID, v) }),
		each(b, bucketAddress, func(_ string, v *Address) { t.addAddress(v) }),
		each(b, bucketNAT, func(_ string, v *NATGateway) { t.addNAT(v) }),
		each(b, bucketPeering, func(_ string, v *Peering) { t.addPeering(v) }),
		each(b, bucketPrefixList, func(_ string, v *PrefixList) { t.PrefixLists = t.PrefixLists.with(v.ID, v) }),
		each(b, bucketDHCP, func(_ string, v *DHCPOptions) { t.DHCPOptions = t.DHCPOptions.with(v.ID, v) }),
		each(b, bucketFlowLog, func(_ string, v *FlowLog) { t.FlowLogs = t.FlowLogs.with(v.ID, v) }),
		each(b, bucketTags, func(k string, v *map[string]string) { t.Tags = t.Tags.with(k, *v) }),
		each(b, bucketToken, func(_ string, v *Token) { t.tokens = t.tokens.with(v.Key, v) }),
	)
}

func each[V any](b *bbolt.Tx, bucket string, fn func(key string, v *V)) error {
	return b.Bucket([]byte(bucket)).ForEach(func(k, raw []byte) error {
		v := new(V)
		if err := json.Unmarshal(raw, v); err != nil {
			return fmt.Errorf("decode %s %s: %w", bucket, k, err)
		}
		fn(string(k), v)
		return nil
	})
}
