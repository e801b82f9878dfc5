package kube

import (
	"math/rand/v2"
	"time"
)

// spread returns d ±25 %.
func spread(d time.Duration) time.Duration { return d*3/4 + rand.N(d/2+1) }
