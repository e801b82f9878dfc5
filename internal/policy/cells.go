package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
)

// The form of a Table, which is that of bpf/node_policy.h.
const (
	// CellSize is a cell's, in bytes: a cache line.
	CellSize = 64
	// TableVersion is the form's, in the first word of a table.
	TableVersion = 1
	// EpochAt is the offset of the epoch, a little-endian word, in the table.
	EpochAt = 4
	// DigestAt is the offset of the Digest in the table.
	DigestAt = 16
	// MaxRules is how many rules a direction can have; AWS's quotas allow a
	// set of groups 1000.
	MaxRules = 2048

	words      = CellSize / 4        // 32-bit words in a cell
	bitsInCell = CellSize * 8        // rules in a cell of a bitmap
	keys6      = CellSize / 16       // IPv6 addresses in a cell
	maxLevels  = 5                   // of trees of words: 16^5 intervals
	maxLevels6 = 8                   // of trees of IPv6 addresses: 4^8
	headCells  = 3                   // header, egress, ingress
	maxCells   = 64 << 20 / CellSize // 64 MiB
)

// TooLargeError says that a direction's rules do not fit into a table.
type TooLargeError struct {
	What     string
	Has, Max int
}

func (e *TooLargeError) Error() string {
	return fmt.Sprintf("%d %s in one direction, of which %d fit: join rules, or give the endpoint fewer groups or policies", e.Has, e.What, e.Max)
}

// cells is a table in the making.
type cells []byte

// count returns how many cells there are.
func (c cells) count() uint32 { return uint32(len(c) / CellSize) }

// grow appends n empty cells and returns the number of the first.
func (c *cells) grow(n int) uint32 {
	first := c.count()
	*c = append(*c, make([]byte, n*CellSize)...)
	return first
}

// words32 appends words, in whole cells, and returns the number of the first.
func (c *cells) words32(values []uint32) uint32 {
	first := c.grow(max(1, (len(values)+words-1)/words))
	for i, v := range values {
		binary.LittleEndian.PutUint32((*c)[int(first)*CellSize+4*i:], v)
	}
	return first
}

// tree appends the ends of intervals as a complete tree of cells, each with fan
// ends; the node i has the children fan*i+1 … fan*i+fan. A leaf's ends are those
// of fan intervals in a row, an inner node's the last of each child. Unused ends
// are the space's last point. It returns the first cell and the levels.
func (c *cells) tree(ends []point, fan int, put func(at []byte, p point)) (first uint32, levels int) {
	leaves := (len(ends) + fan - 1) / fan
	inner, width := 0, 1
	for levels = 1; width < leaves; levels++ {
		inner += width
		width *= fan
	}
	first = c.grow(inner + leaves)
	size := CellSize / fan
	set := func(node, slot int, p point) {
		put((*c)[(int(first)+node)*CellSize+slot*size:], p)
	}
	last := ends[len(ends)-1]
	for i := range leaves * fan {
		end := last
		if i < len(ends) {
			end = ends[i]
		}
		set(inner+i/fan, i%fan, end)
	}
	// From the leaves up: below is the number of intervals under a child.
	for base, n, below := inner, width, fan; base > 0; {
		n /= fan
		base -= n
		for i := range n * fan {
			end := last
			if k := (i+1)*below - 1; k < len(ends) {
				end = ends[k]
			}
			set(base+i/fan, i%fan, end)
		}
		below *= fan
	}
	return first, levels
}

func putWord(at []byte, p point) { binary.LittleEndian.PutUint32(at, uint32(p.lo)) }

// putAddr writes an IPv6 address as two words of 64 bits, the higher first.
func putAddr(at []byte, p point) {
	binary.LittleEndian.PutUint64(at, p.hi)
	binary.LittleEndian.PutUint64(at[8:], p.lo)
}

// table writes a gate down.
func (c *Compiler) table(gate [2]direction) (*Table, error) {
	var out cells
	out.grow(headCells)
	for dir := range gate {
		head, err := c.writeDirection(&out, &gate[dir])
		if err != nil {
			return nil, err
		}
		for i, v := range head {
			binary.LittleEndian.PutUint32(out[(1+dir)*CellSize+4*i:], v)
		}
	}
	if out.count() > maxCells {
		return nil, &TooLargeError{"cells", int(out.count()), maxCells}
	}
	binary.LittleEndian.PutUint32(out, TableVersion)
	sum := sha256.Sum256(out)
	t := &Table{Cells: out, Digest: Digest(sum[:16])}
	copy(out[DigestAt:], t.Digest[:])
	return t, nil
}

// A direction's words, in its cell; struct policy_direction of
// bpf/node_policy.h.
const (
	wordMode = iota
	wordOpen
	wordFallback
	wordLevels // a byte each: IPv4, IPv6, ports; then a bitmap's cells
	wordIPv4   // the first cell of the tree
	wordIPv4Bitmaps
	wordIPv6
	wordIPv6Bitmaps
	wordPorts
	wordPortBitmaps
	wordBitmaps
	wordRules
	wordEverybody4 // the number of the bitmap of rules for 0.0.0.0/0
	wordEverybody6
)

func (c *Compiler) writeDirection(out *cells, d *direction) (head [words]uint32, err error) {
	head[wordMode] = d.mode
	if d.mode == modeNone {
		return head, nil
	}
	n := len(d.rules)
	if n > MaxRules {
		return head, &TooLargeError{"rules", n, MaxRules}
	}
	head[wordOpen] = d.open
	head[wordFallback] = uint32(c.id(d.fallback))

	p := newPool(n)
	var peers [families][][]span
	var ports [][]span
	var all [families]bitmap
	for f := range all {
		all[f] = make(bitmap, p.words)
	}
	ids := make([]uint32, n)
	for i := range d.rules {
		r := &d.rules[i]
		ids[i] = uint32(c.id(r.name))
		ports = append(ports, r.ports)
		for f := range families {
			peers[f] = append(peers[f], r.peers[f])
			if r.everybody[f] {
				all[f].flip(i)
			}
		}
	}
	v4 := newIndex(p, lastOf[ipv4], peers[ipv4])
	v6 := newIndex(p, lastOf[ipv6], peers[ipv6])
	port := newIndex(p, lastPort, ports)
	head[wordEverybody4], head[wordEverybody6] = p.number(all[ipv4]), p.number(all[ipv6])
	for _, l := range []struct {
		what      string
		has, most int
	}{
		{"ranges of IPv4 addresses", len(v4.ends), 1 << (4 * maxLevels)},
		{"ranges of IPv6 addresses", len(v6.ends), 1 << (2 * maxLevels6)},
		{"ranges of ports", len(port.ends), 1 << (4 * maxLevels)},
	} {
		if l.has > l.most {
			return head, &TooLargeError{l.what, l.has, l.most}
		}
	}

	// The last end of each tree is all ones, so that no key is beyond it.
	port.ends[len(port.ends)-1] = point{0, 1<<32 - 1}
	var levels, levels6, levelsP int
	head[wordIPv4], levels = out.tree(v4.ends, words, putWord)
	head[wordIPv4Bitmaps] = out.words32(v4.bitmaps)
	head[wordIPv6], levels6 = out.tree(v6.ends, keys6, putAddr)
	head[wordIPv6Bitmaps] = out.words32(v6.bitmaps)
	head[wordPorts], levelsP = out.tree(port.ends, words, putWord)
	head[wordPortBitmaps] = out.words32(port.bitmaps)

	each := (n + bitsInCell - 1) / bitsInCell
	each = max(1, each)
	head[wordBitmaps] = out.count()
	for _, b := range p.all {
		b = append(slices.Clone(b), make(bitmap, each*bitsInCell/64-len(b))...)
		first := out.grow(each)
		for i, w := range b {
			binary.LittleEndian.PutUint64((*out)[int(first)*CellSize+8*i:], w)
		}
	}
	head[wordRules] = out.words32(ids)
	head[wordLevels] = uint32(levels) | uint32(levels6)<<8 | uint32(levelsP)<<16 | uint32(each)<<24
	return head, nil
}
