package ipam

import (
	"fmt"
	"testing"
	"time"
)

// A step that EC2 refuses, for whatever reason that it may give, is not tried in
// a storm: each class has something that spaces it out.
func TestRefusedStepsAreSpacedOut(t *testing.T) {
	for _, refused := range []Action{AssignAddresses{}, CreateENI{}, AttachENI{}, SetDeleteOnTermination{}} {
		for class := ClassOther; class <= ClassInUse; class++ {
			_, assigns := refused.(AssignAddresses)
			_, makes := refused.(CreateENI)
			if class == ClassSubnetFull && !assigns && !makes || class == ClassNoPrefix || class == ClassENIFull && makes {
				continue // what EC2 cannot say of this call; single addresses are asked for
			}
			t.Run(fmt.Sprintf("%T/%d", refused, class), func(t *testing.T) {
				w := newWorld(t, "m5.large", 1)
				w.callLatency = time.Millisecond
				calls := 0
				w.fail = func(a Action) (Outcome, Class) {
					if fmt.Sprintf("%T", a) != fmt.Sprintf("%T", refused) {
						return Done, 0
					}
					calls++
					return Refused, class
				}
				w.start()
				for i := range 12 {
					w.add(RequestID(i+1), Pool{})
				}
				w.pass(51 * time.Second)
				if calls > 60 {
					t.Errorf("%d calls in 51 s", calls)
				}
			})
		}
	}
}
