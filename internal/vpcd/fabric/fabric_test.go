package fabric

import (
	"testing"
)

func TestDelivery(t *testing.T) {
	l := newLab(t)
	a1 := l.add(subnetA, "10.0.0.4")
	a2 := l.add(subnetA, "10.0.0.5")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	a1.reaches(a2)
	a2.reaches(a1)
	a1.reaches(b)
	b.reaches(a2)
}
