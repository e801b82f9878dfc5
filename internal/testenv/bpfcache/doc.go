// Package bpfcache keeps BPF programs that are loaded, and their maps, from one
// test to the next. It is imported by tests alone.
//
// The verifier takes 0.2 to 0.4 s of a core for the programs of a node or of a
// fabric, and hundreds of tests load them. A program is bound to its maps, so it
// can be used again by who gets the same maps:
//
//	what a spec pins      is shared by all programs that are loaded in a world (a
//	                      directory of pins, one "machine" of a test), and emptied
//	                      when the world is released
//	what it does not pin  (ring buffers, scratch, global variables) belongs to one
//	                      set of programs, and is as new at each Load
//
// A test sees no difference to CollectionSpec.LoadAndAssign: a new world has empty
// maps, one that is opened again has those that are pinned there, and the programs
// of a second Load are none that may run there still (see Replaced), so that they have
// to be put in the place of those, whose own maps nobody touches.
//
// # State
//
// All is in a BPF file system of the cache's own, where further processes of the
// same test find it:
//
//	m<number>/maps/<map>                      the shared maps
//	m<number>/s_<key>_<number>/p_<program>    a set of programs
//	m<number>/s_<key>_<number>/m_<map>        and the maps that are its own
//	m<number>/used_<set>                      a directory: the set may run in the world
//	m<number>/last_<set>                      a directory: the set of the latest Load
//
// Only the process that made the cache gives maps to new worlds and takes them back.
//
// # Concurrency
//
// All methods are safe for concurrent use. One process at a time may be at work in
// a world, as the datapath's and the fabric's locks demand anyway. A goroutine per
// Release empties maps, which waits for RCU grace periods; Close waits for them.
package bpfcache
