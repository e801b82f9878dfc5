package datapath

// Status is how the datapath goes on, in numbers.
type Status struct {
	// Where the programs stand, on host veths and on ENIs: Clsact or TCX.
	Hook, ENIHook Hook
	Moved         int  // host veths of pods that were busy, whose programs are on TCX by now
	Direct        bool // connections within the VPC may bypass the stack
	// Connections are the entries of conntrack as the latest sweep, every 5 s, saw
	// them; MaxConnections how many there can be.
	Connections, DirectConnections, MaxConnections int
	Paths                                          Paths
}

// SlowShare is the part of pods' packets that took the kernel's stack, 0 to 1; 0 if
// there were none.
func (p Paths) SlowShare() float64 {
	slow := p.Stack + p.Exceptions
	if p.Direct+slow == 0 {
		return 0
	}
	return float64(slow) / float64(p.Direct+slow)
}

// Status returns the datapath's state.
func (d *Datapath) Status() (Status, error) {
	paths, err := d.Paths()
	if err != nil {
		return Status{}, err
	}
	d.mu.Lock()
	fill, moved := d.fill, len(d.moved)
	d.mu.Unlock()
	return Status{
		Hook: d.hooks.kind, ENIHook: d.eniHooks.kind, Moved: moved, Direct: d.opts.Direct, Paths: paths,
		Connections: fill.entries, DirectConnections: fill.direct, MaxConnections: int(d.objs.Conns.MaxEntries() + d.objs.ConnWays.MaxEntries()),
	}, nil
}
