package differential

import (
	"fmt"
	"maps"
	"net/http"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// toService is who receives what is for the VPC's services, which no interface has:
// their interface's counter of exempt packets says so.
const toService = "the VPC"

// isService reports whether a packet is for a service, by its address.
func isService(v vpcmodel.Verdict) bool { return v.Service.IsValid() && v.Rule == "service" }

// exempt prepares to tell which packets of a batch go to services: what it
// returns is called when the batch is through.
func (r *runner) exempt(batch []sending) (func() error, error) {
	sends := map[vpc.ENIID][]sending{}
	for _, b := range batch {
		// No service depends on what the batch does.
		if p := b.Packet; isService(r.cloud.world.Peek(&p)) {
			sends[b.From] = append(sends[b.From], b)
		}
	}
	if len(sends) == 0 {
		return func() error { return nil }, nil
	}
	before, err := r.counters()
	if err != nil {
		return nil, err
	}
	return func() error {
		after, err := r.counters()
		if err != nil {
			return err
		}
		for _, from := range slices.Sorted(maps.Keys(sends)) {
			eni, want := vpc.ENIID(r.cloud.ids[string(from)]), uint64(0)
			for _, b := range sends[from] {
				want += uint64(r.whole[b.index])
			}
			got := after[eni].ExemptTxPackets - before[eni].ExemptTxPackets
			for _, b := range sends[from] {
				switch who := r.out.received[b.index]; {
				case who == "" && got == want:
					r.out.received[b.index] = toService
				case who == "":
					r.out.received[b.index] = fmt.Sprintf("nobody (of %d packets for services %s's exempt ones have %d)", want, from, got)
				}
			}
		}
		return nil
	}, nil
}

// counters are those of all interfaces.
func (s *stand) counters() (counters map[vpc.ENIID]fabric.Counters, err error) {
	return counters, s.admin(http.MethodGet, "counters", nil, &counters)
}
