package differential

import (
	"slices"

	"github.com/underlay-cni/underlay/test/vpcmodel"
)

func sorted(s []string) []string {
	slices.Sort(s)
	return s
}

// fit returns the statements of a script that the model has a place for: what
// names an object that is not there any more goes as well.
func fit(s vpcmodel.Script) vpcmodel.Script {
	w := vpcmodel.NewWorld(vpcmodel.Defaults())
	var out vpcmodel.Script
	for _, st := range s {
		if st.Apply(w) == nil {
			out = append(out, st)
		}
	}
	return out
}

// Shrink removes statements as long as differs says that model and fabric still
// differ, with at most tries calls of it. What remains is a script from which no
// single statement can be removed, if the tries sufficed.
func Shrink(s vpcmodel.Script, tries int, differs func(vpcmodel.Script) bool) vpcmodel.Script {
	for size := len(s) / 2; size > 0; {
		removed := false
		for at := len(s); at > 0; at -= size { // from the end: packets go before objects
			from := max(0, at-size)
			smaller := fit(slices.Concat(s[:from], s[at:]))
			if len(smaller) == len(s) {
				continue
			}
			if tries--; tries < 0 {
				return s
			}
			if differs(smaller) {
				s, removed = smaller, true
				at = min(at, len(s)+size)
			}
		}
		if !removed || size > len(s)/2 {
			size /= 2
		}
	}
	return s
}
