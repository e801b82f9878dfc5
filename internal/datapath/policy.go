package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/policy"
)

// policies is what of policy is in the kernel: read from the maps by Open, and
// following them.
type policies struct {
	// mu guards the fields below, and is held while the maps change.
	mu         sync.Mutex
	tables     map[policy.Digest]*policyTable
	numbers    map[uint32]*policyTable
	users      map[uint32][policy.Gates]*policyTable // by ifindex of the host veth
	unused     []*policyTable                        // no endpoint has them; the oldest first
	epoch      uint32                                // the latest that was given
	generation uint32
}

// policyTable is a table in the kernel.
type policyTable struct {
	digest policy.Digest
	number uint32 // in map policy_tables, from 1 on
	epoch  uint32
	users  int // endpoints
}

// unusedTables is how many tables are kept that no endpoint has any more. The
// kernel takes some 10 ms to forget one (it waits until no program reads it), as
// it does to exchange one: so the next table takes an unused one's place.
const unusedTables = 16

// SetPolicy puts the policy of an endpoint in force, as package policy compiled
// it. It is the place for it: Options.BeforeReady, before the first packet, and
// whenever rules or memberships change. Each gate is exchanged whole: a packet is
// judged by the table before or by the one after. An endpoint's policy stays
// when the agent goes, and goes with the endpoint.
//
// Endpoints with equal tables share them in the kernel: the first call brings a
// table there, others name it. What is in force already is not touched; the
// first new table costs some 10 ms, all else microseconds.
//
// ErrNotFound: the endpoint is gone.
func (d *Datapath) SetPolicy(e Endpoint, t policy.Tables) error {
	p := &d.policies
	p.mu.Lock()
	defer p.mu.Unlock()
	index := uint32(e.HostIfIndex)
	var v bpfgen.NodeIface
	// Delete removes this entry first, and comes here for the policy after.
	err := d.objs.Ifaces.Lookup(&index, &v)
	if errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && v.Addr != addrKey(e.Addr) {
		return fmt.Errorf("set the policy of %s: %w", e.String(), ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("look up interface %d: %w", index, err)
	}

	entry := bpfgen.NodePolicyEndpoint{Ifindex: index}
	if t.Stack {
		entry.Flags |= uint32(bpfgen.NodePolicyFlagsPOLICY_STACK)
	}
	var tables [policy.Gates]*policyTable
	for g, gate := range t.Gates {
		if gate == nil {
			continue
		}
		if tables[g], err = d.loadTable(gate); err != nil {
			p.release(tables)
			return fmt.Errorf("set the policy of %s, %s: %w", e.String(), policy.GateID(g), err)
		}
		tables[g].users++
		entry.Table[g], entry.Epoch[g] = tables[g].number, tables[g].epoch
	}
	var old bpfgen.NodePolicyEndpoint
	if err := d.objs.PolicyEndpoints.Lookup(&index, &old); err == nil && old == entry {
		p.release(tables) // it has them, and is counted for them
		return nil
	}
	err = nl.AwaitMemory(func() error { return d.objs.PolicyEndpoints.Update(&index, &entry, ebpf.UpdateAny) })
	if err != nil {
		p.release(tables)
		return fmt.Errorf("set the policy of %s: %w", e.String(), err)
	}
	p.release(p.users[index])
	p.users[index] = tables
	return d.nextGeneration()
}

// release counts an endpoint less for each table.
func (p *policies) release(tables [policy.Gates]*policyTable) {
	for _, t := range tables {
		if t == nil {
			continue
		}
		if t.users--; t.users == 0 {
			p.unused = append(p.unused, t)
		}
	}
}

// dropPolicy forgets the policy of a host interface that passes nothing any more.
func (d *Datapath) dropPolicy(index uint32) error {
	p := &d.policies
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := d.objs.PolicyEndpoints.Delete(&index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove the policy of interface %d: %w", index, err)
	}
	p.release(p.users[index])
	delete(p.users, index)
	return nil
}

// nextGeneration tells the programs that verdicts may have changed. It comes after
// the change: whoever reads it reads what is new.
func (d *Datapath) nextGeneration() error {
	var zero uint32
	next := d.policies.generation + 1
	if next == 0 {
		next = 1
	}
	if err := d.objs.PolicyGeneration.Update(&zero, &next, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("raise the policies' generation: %w", err)
	}
	d.policies.generation = next
	return nil
}

// readGeneration reads the policies' generation before any program asks for it.
// The first is 1: flows that nobody judged have 0.
func (d *Datapath) readGeneration() error {
	p := &d.policies
	p.mu.Lock()
	defer p.mu.Unlock()
	var zero uint32
	if err := d.objs.PolicyGeneration.Lookup(&zero, &p.generation); err != nil {
		return fmt.Errorf("read the policies' generation: %w", err)
	}
	if p.generation != 0 {
		return nil
	}
	return d.nextGeneration()
}

// cell is the unit of a table.
type cell [policy.CellSize]byte

// loadTable brings a table to the kernel if it is not there.
func (d *Datapath) loadTable(t *policy.Table) (*policyTable, error) {
	p := &d.policies
	if known := p.tables[t.Digest]; known != nil {
		if i := slices.Index(p.unused, known); i >= 0 {
			p.unused = slices.Delete(p.unused, i, i+1)
		}
		return known, nil
	}
	next := p.epoch + 1
	if next == 0 {
		next = 1
	}
	cells := make([]cell, len(t.Cells)/policy.CellSize)
	numbers := make([]uint32, len(cells))
	for i := range cells {
		copy(cells[i][:], t.Cells[i*policy.CellSize:])
		numbers[i] = uint32(i)
	}
	binary.LittleEndian.PutUint32(cells[0][policy.EpochAt:], next)

	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "policy_table", Type: ebpf.Array, Flags: unix.BPF_F_INNER_MAP,
		KeySize: 4, ValueSize: policy.CellSize, MaxEntries: uint32(len(cells)),
	})
	if err != nil {
		return nil, fmt.Errorf("make a table of %d KiB: %w", len(t.Cells)>>10, err)
	}
	defer m.Close() // the map of tables holds it
	if _, err := m.BatchUpdate(numbers, cells, nil); err != nil {
		return nil, fmt.Errorf("fill a table: %w", err)
	}
	// It is never changed again, by nobody.
	if err := m.Freeze(); err != nil {
		return nil, fmt.Errorf("freeze a table: %w", err)
	}

	number, old := uint32(0), (*policyTable)(nil)
	if len(p.unused) > 0 {
		old = p.unused[0]
		number = old.number
	} else if number = p.freeNumber(); number == 0 {
		return nil, fmt.Errorf("all %d tables of policy are in use", d.objs.PolicyTables.MaxEntries()-1)
	}
	if err := d.objs.PolicyTables.Update(&number, m, ebpf.UpdateAny); err != nil {
		return nil, fmt.Errorf("enter a table: %w", err)
	}
	if old != nil {
		p.forget(old)
	}
	for len(p.unused) > unusedTables {
		if err := d.removeTable(p.unused[0]); err != nil {
			return nil, err
		}
	}
	p.epoch = next
	known := &policyTable{digest: t.Digest, number: number, epoch: next}
	p.tables[t.Digest], p.numbers[number] = known, known
	return known, nil
}

// forget removes an unused table from the memory of them.
func (p *policies) forget(t *policyTable) {
	delete(p.tables, t.digest)
	delete(p.numbers, t.number)
	if i := slices.Index(p.unused, t); i >= 0 {
		p.unused = slices.Delete(p.unused, i, i+1)
	}
}

// removeTable removes an unused table from the kernel.
func (d *Datapath) removeTable(t *policyTable) error {
	if err := d.objs.PolicyTables.Delete(&t.number); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove table %d of policy: %w", t.number, err)
	}
	d.policies.forget(t)
	return nil
}

// freeNumber returns the lowest number that no table has, or 0.
func (p *policies) freeNumber() uint32 {
	for n := uint32(1); n < maxPolicyTables; n++ {
		if p.numbers[n] == nil {
			return n
		}
	}
	return 0
}

// maxPolicyTables is the size of map policy_tables.
const maxPolicyTables = uint32(bpfgen.NodeNodeConstNODE_POLICY_TABLES)

// recoverPolicies reads what an agent before left, and removes what no live
// endpoint has; wanted are the ifindexes of those.
func (d *Datapath) recoverPolicies(wanted map[uint32]bool) error {
	p := &d.policies
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tables, p.numbers = map[policy.Digest]*policyTable{}, map[uint32]*policyTable{}
	p.users, p.unused = map[uint32][policy.Gates]*policyTable{}, nil

	if err := d.readTables(); err != nil {
		return err
	}

	var errs []error
	var index uint32
	var entry bpfgen.NodePolicyEndpoint
	var stale []uint32
	it := d.objs.PolicyEndpoints.Iterate()
	for it.Next(&index, &entry) {
		if !wanted[index] {
			stale = append(stale, index)
			continue
		}
		var tables [policy.Gates]*policyTable
		for g, number := range entry.Table {
			if number == 0 {
				continue
			}
			if tables[g] = p.numbers[number]; tables[g] == nil {
				// Its packets are denied until it is set again.
				d.log.Warn("an endpoint's policy is lost: it passes nothing new until it is set", "link", index, "gate", policy.GateID(g).String())
				continue
			}
			tables[g].users++
		}
		p.users[index] = tables
	}
	errs = append(errs, it.Err())
	for _, index := range stale {
		if err := d.objs.PolicyEndpoints.Delete(&index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("remove the policy of interface %d: %w", index, err))
		}
	}
	for _, t := range p.numbers {
		if t.users == 0 {
			p.unused = append(p.unused, t)
		}
	}
	slices.SortFunc(p.unused, func(a, b *policyTable) int { return int(a.epoch) - int(b.epoch) })
	for len(p.unused) > unusedTables {
		if err := d.removeTable(p.unused[0]); err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
	return errors.Join(errs...)
}

// readTables reads which tables are in the kernel.
func (d *Datapath) readTables() error {
	p := &d.policies
	var cursor ebpf.MapBatchCursor
	numbers, ids := make([]uint32, 4096), make([]uint32, 4096)
	for {
		n, err := d.objs.PolicyTables.BatchLookup(&cursor, numbers, ids, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("list the tables of policy: %w", err)
		}
		for i := range n {
			t, err := readTable(ebpf.MapID(ids[i]))
			if err != nil {
				return fmt.Errorf("read table %d of policy: %w", numbers[i], err)
			}
			t.number = numbers[i]
			p.tables[t.digest], p.numbers[t.number] = t, t
			p.epoch = max(p.epoch, t.epoch) // the latest is there: a table goes only after one with a later epoch came
		}
		if err != nil {
			return nil
		}
	}
}

func readTable(id ebpf.MapID) (*policyTable, error) {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	var zero uint32
	var head cell
	if err := m.Lookup(&zero, &head); err != nil {
		return nil, err
	}
	if v := binary.LittleEndian.Uint32(head[:]); v != policy.TableVersion {
		return nil, fmt.Errorf("it has form %d, this agent knows %d: drain the node, then remove the directory of maps", v, policy.TableVersion)
	}
	return &policyTable{
		digest: policy.Digest(head[policy.DigestAt : policy.DigestAt+len(policy.Digest{})]),
		epoch:  binary.LittleEndian.Uint32(head[policy.EpochAt:]),
	}, nil
}
