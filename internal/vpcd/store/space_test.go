package store

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// TestSpaceAgainstASlowOne compares a Space, as addresses come and go and
// ranges are set aside and brought back, with two lists of booleans.
func TestSpaceAgainstASlowOne(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 3))
		cidr := netip.PrefixFrom(netip.MustParseAddr("10.0.0.0"), 24+r.IntN(5))
		s := newSpace(cidr)
		used := make([]bool, s.Size())
		for _, i := range []int{0, 1, 2, 3, s.Size() - 1} {
			used[i] = true
		}
		aside := map[netip.Prefix]bool{}
		for range 60 {
			s = s.clone()
			switch r.IntN(3) {
			case 0:
				p := netip.PrefixFrom(s.addr(r.IntN(s.Size())), cidr.Bits()+r.IntN(33-cidr.Bits())).Masked()
				overlaps := false
				for o := range aside {
					overlaps = overlaps || o.Overlaps(p)
				}
				prefixes := r.IntN(2) == 0
				if s.setAside(p, prefixes) == overlaps {
					t.Fatalf("seed %d: setAside(%s) = %v beside %v", seed, p, overlaps, aside)
				}
				if !overlaps {
					aside[p] = prefixes
				}
			case 1:
				for p := range aside {
					s.bringBack(p)
					delete(aside, p)
					break
				}
			default:
				i := 4 + r.IntN(s.Size()-5)
				s.flip(i, 1)
				used[i] = !used[i]
			}
			compareSpaces(t, s, used, aside)
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// compareSpaces asks of s all that can be asked, from every start.
func compareSpaces(t *testing.T, s *Space, used []bool, aside map[netip.Prefix]bool) {
	t.Helper()
	const none, explicit, prefix = 0, 1, 2
	kind := func(i int) int {
		for p, prefixes := range aside {
			if p.Contains(s.addr(i)) {
				if prefixes {
					return prefix
				}
				return explicit
			}
		}
		return none
	}
	// whole returns the kind that all addresses of a free block have.
	whole := func(i int) int {
		for k := i; k < i+blockSize; k++ {
			if used[k] || kind(k) != kind(i) {
				return -1
			}
			// One range, not two side by side: a prefix is of one reservation.
			for p := range aside {
				if p.Contains(s.addr(i)) != p.Contains(s.addr(k)) {
					return -1
				}
			}
		}
		return kind(i)
	}
	free, forPrefixes := 0, 0
	for i := range used {
		if !used[i] && kind(i) == none {
			free++
		}
		if !used[i] && kind(i) != explicit {
			forPrefixes++
		}
	}
	if s.Free() != free || s.FreeForPrefixes() != forPrefixes {
		t.Errorf("%d and %d free, want %d and %d", s.Free(), s.FreeForPrefixes(), free, forPrefixes)
	}
	for _, start := range []int{0, 1, 17, s.Size() / 2, s.Size() - 1} {
		start = min(start, s.Size()-1)
		var addrs []netip.Addr
		for n := range used {
			if i := (start + n) % len(used); !used[i] && kind(i) == none {
				addrs = append(addrs, s.addr(i))
			}
		}
		if got := slices.Collect(s.FreeAddrs(start)); !slices.Equal(got, addrs) {
			t.Errorf("from %d: %v, want %v", start, got, addrs)
		}
		var blocks []netip.Prefix
		for _, of := range []int{prefix, none} {
			for n := 0; n < len(used); n += blockSize {
				if i := (start&^(blockSize-1) + n) % len(used); whole(i) == of {
					blocks = append(blocks, netip.PrefixFrom(s.addr(i), vpc.PrefixBits))
				}
			}
		}
		if got := slices.Collect(s.FreeBlocks(start)); !slices.Equal(got, blocks) {
			t.Errorf("from %d: %v, want %v; set aside %v", start, got, blocks, aside)
		}
	}
}

func TestReservations(t *testing.T) {
	path := t.TempDir() + "/state.db"
	s := open(t, path, Options{})
	r := &Reservation{ID: "scr-00000000000000001", Subnet: testSubnet, CIDR: netip.MustParsePrefix("10.0.0.128/25"), Prefixes: true}
	update(t, s, func(tx *Tx) {
		network(tx)
		tx.PutReservation(r)
		tx.SetTags(r.ID, map[string]string{"a": "b"})
	})
	before := s.View()
	if got := before.Space(testSubnet).Free(); got != 128-4 {
		t.Errorf("%d free", got)
	}
	over := *r
	over.ID = "scr-00000000000000002"
	if err := s.Update(func(tx *Tx) error { tx.PutReservation(&over); return nil }); err == nil {
		t.Error("two reservations of one range")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path, Options{})
	if got, ok := s.View().Reservations.Get(r.ID); !ok || *got != *r || s.View().Space(testSubnet).Free() != 128-4 {
		t.Errorf("after a restart %v, %d free", got, s.View().Space(testSubnet).Free())
	}
	update(t, s, func(tx *Tx) { tx.DeleteReservation(r.ID) })
	if v := s.View(); v.Reservations.Len() != 0 || v.TagsOf(r.ID) != nil || v.Space(testSubnet).Free() != 251 {
		t.Errorf("deleted: %d reservations, tags %v, %d free", v.Reservations.Len(), v.TagsOf(r.ID), v.Space(testSubnet).Free())
	}
	if before.Space(testSubnet).Free() != 124 {
		t.Error("an old snapshot changed")
	}
	update(t, s, func(tx *Tx) { tx.PutReservation(r); tx.DeleteSubnet(testSubnet) })
	if n := s.View().Reservations.Len(); n != 0 {
		t.Errorf("%d reservations of a subnet that is gone", n)
	}
}
