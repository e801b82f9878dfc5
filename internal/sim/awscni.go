package sim

import (
	"net/netip"
	"slices"
	"time"
)

// The constants of the AWS VPC CNI's loop, at v1.23.
const (
	awsTick       = 5 * time.Second        // between looks at the pool
	awsShrink     = 30 * time.Second       // at the least, between two returns
	awsENIAge     = time.Minute            // a younger interface is not returned
	awsCooldown   = 30 * time.Second       // IP_COOLDOWN_PERIOD
	awsNoAddress  = 2 * time.Minute        // the pause after a subnet had too few
	awsMetaFirst  = 100 * time.Millisecond // between looks at IMDS, doubled each time
	awsMetaTries  = 12
	awsMetaLimit  = time.Minute
	awsDetach     = 2 * time.Second // between detaching and deleting
	awsDeletes    = 12              // tries to delete an interface
	awsDeleteTime = time.Minute
	awsSweep      = time.Hour // between sweeps for leaked interfaces
	awsSweepAge   = 5 * time.Minute
)

// awscni is the AWS VPC CNI on one node, after its documentation and observed
// behaviour: a loop that looks at the pool every five seconds and does one
// thing about it, in series; an ADD that fails when there is no address at
// once. It shares nothing with package ipam.
type awscni struct {
	w      *world
	h      *host
	sdk    retryer
	enis   []*awsENI
	total  int           // addresses in the pool, primaries not counted
	used   int           // by pods
	pause  time.Duration // no growth until then
	shrank time.Duration // last return
}

type awsENI struct {
	e     *iface
	since time.Duration
	own   bool // the node's primary interface
	ips   []awsIP
	used  int
}

type awsIP struct {
	addr netip.Addr
	used bool
	cool time.Duration // not handed out before
	pfx  netip.Prefix
}

func newAWS(h *host) cni { return &awscni{w: h.w, h: h, sdk: retryer{tokens: retryTokens}} }

func (n *awscni) knobs() *AWSKnobs { return &n.w.cfg.AWS }

// per returns the addresses of a slot.
func (n *awscni) per() int {
	if n.w.cfg.Prefixes {
		return prefixSize
	}
	return 1
}

// max returns the addresses that an interface holds beside its primary.
func (n *awscni) max() int { return (n.w.cfg.limits.IPv4PerENI - 1) * n.per() }

func (n *awscni) after(d time.Duration, fn func()) {
	n.w.clk.after(d, func() {
		if n.h.alive {
			fn()
		}
	})
}

func (n *awscni) boot() {
	n.call(describeInterfaces, func() code { return ok }, func(res code) {
		if res != ok {
			n.after(awsTick, n.boot) // it ends and is started again
			return
		}
		n.enis = []*awsENI{{e: n.h.enis[0], own: true, since: n.w.clk.now}}
		n.w.markReady(n.h)
		n.after(time.Duration(n.w.cloud.rng.Int64N(int64(awsSweepAge))), n.sweep)
		n.tick()
	})
}

func (n *awscni) tick() {
	n.pool(func() { n.after(awsTick, n.tick) })
}

// pool looks at the pool, does at most one thing about it, then calls done.
func (n *awscni) pool(done func()) {
	if n.short() > 0 {
		n.grow(done)
		return
	}
	if n.w.clk.now-n.shrank < awsShrink {
		done()
		return
	}
	n.shrink(done)
}

// free returns what the loop takes for available: cooling addresses included.
func (n *awscni) free() int { return n.total - n.used }

// freePrefixes returns the prefixes of which no address is in use.
func (n *awscni) freePrefixes() int {
	free := 0
	for _, e := range n.enis {
		for i := 0; i < len(e.ips); i += prefixSize {
			if !slices.ContainsFunc(e.ips[i:i+prefixSize], func(a awsIP) bool { return a.used }) {
				free++
			}
		}
	}
	return free
}

// short returns how many addresses the warm targets lack.
func (n *awscni) short() int {
	k := n.knobs()
	if n.total >= n.w.cfg.maxPods() {
		return 0
	}
	switch {
	case k.byIP():
		short := max(k.WarmIP-n.free(), k.MinimumIP-n.total, 0)
		return (short + n.per() - 1) / n.per() * n.per()
	case n.w.cfg.Prefixes && k.WarmPrefix > 0:
		return max(0, k.WarmPrefix-n.freePrefixes()) * prefixSize
	}
	return max(0, k.WarmENI*n.max()-n.free())
}

// wanted returns how much of room to ask for: all of it, unless a target says
// less.
func (n *awscni) wanted(room int) int {
	if n.knobs().byIP() || n.w.cfg.Prefixes && n.knobs().WarmPrefix > 0 {
		return min(n.short(), room)
	}
	return room
}

// grow fills an interface at hand, or else makes one.
func (n *awscni) grow(done func()) {
	if n.w.clk.now < n.pause {
		done()
		return
	}
	for _, e := range n.enis {
		if room := n.max() - len(e.ips); room >= n.per() {
			n.fill(e, n.wanted(room), done)
			return
		}
	}
	if len(n.enis) < n.w.cfg.maxENIs() {
		n.extend(done)
		return
	}
	done()
}

// fill assigns to an interface; if the subnet has too few for all, one.
func (n *awscni) fill(e *awsENI, want int, done func()) {
	n.assign(e, want, func(res code) {
		if res == subnetFull && want > 1 {
			n.assign(e, 1, func(res code) { n.refused(res); done() })
			return
		}
		n.refused(res)
		done()
	})
}

// refused begins the pause after a subnet had too few addresses.
func (n *awscni) refused(res code) {
	if res == subnetFull || res == noPrefix {
		n.pause = n.w.clk.now + awsNoAddress
	}
}

func (n *awscni) assign(e *awsENI, want int, done func(code)) {
	var addrs []netip.Addr
	var prefixes []netip.Prefix
	n.call(assignAddresses, func() (res code) {
		if n.w.cfg.Prefixes {
			prefixes, res = n.w.cloud.assignPrefixes(e.e, want/prefixSize)
		} else {
			addrs, res = n.w.cloud.assign(e.e, want)
		}
		return res
	}, func(res code) {
		if res == ok {
			n.store(e, addrs, prefixes)
		}
		done(res)
	})
}

// store puts addresses into the pool. The loop does not wait for IMDS here.
func (n *awscni) store(e *awsENI, addrs []netip.Addr, prefixes []netip.Prefix) {
	e.put(addrs, prefixes)
	n.total += len(addrs) + len(prefixes)*prefixSize
}

func (e *awsENI) put(addrs []netip.Addr, prefixes []netip.Prefix) {
	for _, a := range addrs {
		e.ips = append(e.ips, awsIP{addr: a})
	}
	for _, p := range prefixes {
		for a := p.Addr(); p.Contains(a); a = a.Next() {
			e.ips = append(e.ips, awsIP{addr: a, pfx: p})
		}
	}
}

// extend makes and attaches one interface, step by step.
func (n *awscni) extend(done func()) {
	c := n.w.cloud
	none := func() code { return ok }
	var e *iface
	n.call(describeSubnets, none, func(res code) {
		if res != ok {
			done()
			return
		}
		want := n.wanted(n.max())
		n.call(createInterface, func() (res code) {
			e, res = c.create(n.h, max(1, want/n.per()), n.w.cfg.Prefixes)
			return res
		}, func(res code) {
			if res != ok {
				n.refused(res)
				done()
				return
			}
			n.call(describeInstances, none, func(res code) {
				if res != ok {
					n.delete(e, done)
					return
				}
				n.call(attachInterface, func() code { return c.attach(e, n.device()) }, func(res code) {
					if res != ok {
						n.delete(e, done)
						return
					}
					n.call(modifyInterface, func() code { return c.setDeleteOnTermination(e) }, func(res code) {
						if res != ok {
							n.detach(e, done)
							return
						}
						n.await(e, awsMetaFirst, 0, n.w.clk.now, done)
					})
				})
			})
		})
	})
}

// device returns the lowest free device index.
func (n *awscni) device() int {
	for d := 1; ; d++ {
		if !slices.ContainsFunc(n.h.enis, func(e *iface) bool { return e.attached && e.device == d }) {
			return d
		}
	}
}

// await looks at IMDS until it lists the interface with its addresses.
func (n *awscni) await(e *iface, delay time.Duration, tries int, began time.Duration, done func()) {
	if e.gone {
		done()
		return
	}
	if e.deviceAt <= n.w.clk.now && !slices.ContainsFunc(e.grants, func(g grant) bool { return !n.w.cloud.listed(e, &g) }) {
		a := &awsENI{e: e, since: n.w.clk.now}
		for i := range e.grants {
			a.put(e.grants[i].addrs, e.grants[i].prefixes)
		}
		n.after(n.knobs().LinkWait, func() {
			n.enis = append(n.enis, a)
			n.total += len(a.ips)
			done()
		})
		return
	}
	if tries >= awsMetaTries || n.w.clk.now-began > awsMetaLimit {
		n.detach(e, done)
		return
	}
	n.after(delay, func() { n.await(e, 2*delay, tries+1, began, done) })
}

// detach gives an interface back: detached, two seconds later deleted.
func (n *awscni) detach(e *iface, done func()) {
	n.call(detachInterface, func() code { return n.w.cloud.detach(e) }, func(res code) {
		if res != ok && res != notFound {
			done()
			return
		}
		n.after(awsDetach, func() { n.delete(e, done) })
	})
}

func (n *awscni) delete(e *iface, done func()) {
	n.tryDelete(e, 500*time.Millisecond, 1, n.w.clk.now, done)
}

func (n *awscni) tryDelete(e *iface, delay time.Duration, tries int, began time.Duration, done func()) {
	n.call(deleteInterface, func() code { return n.w.cloud.delete(e) }, func(res code) {
		if res == ok || res == notFound || tries >= awsDeletes || n.w.clk.now-began > awsDeleteTime {
			done() // what is left, the sweep finds
			return
		}
		n.after(delay, func() { n.tryDelete(e, min(2*delay, 10*time.Second), tries+1, began, done) })
	})
}

// spare reports whether the targets hold without count of the free addresses.
func (n *awscni) spare(count int) bool {
	k := n.knobs()
	switch {
	case k.byIP():
		return n.free()-count >= k.WarmIP && n.total-count >= k.MinimumIP
	case n.w.cfg.Prefixes && k.WarmPrefix > 0:
		return n.freePrefixes()-count/prefixSize >= k.WarmPrefix
	}
	return n.free()-count >= k.WarmENI*n.max()
}

// shrink returns one interface that nothing uses, or else single addresses or
// prefixes above the targets.
func (n *awscni) shrink(done func()) {
	now := n.w.clk.now
	for i, e := range n.enis {
		if e.own || e.used > 0 || now-e.since < awsENIAge || !n.spare(len(e.ips)) ||
			slices.ContainsFunc(e.ips, func(a awsIP) bool { return a.cool > now }) {
			continue
		}
		n.shrank = now
		n.total -= len(e.ips)
		n.enis = slices.Delete(n.enis, i, i+1)
		n.detach(e.e, func() {
			if e.e.attached { // refused: it stays
				n.total += len(e.ips)
				n.enis = append(n.enis, e)
			}
			done()
		})
		return
	}
	if k := n.knobs(); !k.byIP() && (!n.w.cfg.Prefixes || k.WarmPrefix <= 0) {
		done()
		return
	}
	for _, e := range n.enis {
		addrs, prefixes := n.surplus(e)
		if len(addrs)+len(prefixes) == 0 {
			continue
		}
		n.shrank = now
		n.call(unassignAddresses, func() code { return n.w.cloud.unassign(e.e, addrs, prefixes) }, func(res code) {
			if res != ok {
				n.store(e, addrs, prefixes)
			}
			done()
		})
		return
	}
	done()
}

// surplus takes from the pool what an interface can give back above the
// targets.
func (n *awscni) surplus(e *awsENI) (addrs []netip.Addr, prefixes []netip.Prefix) {
	now, per := n.w.clk.now, n.per()
	for i := len(e.ips) - per; i >= 0; i -= per {
		slot := e.ips[i : i+per]
		if slices.ContainsFunc(slot, func(a awsIP) bool { return a.used || a.cool > now }) || !n.spare(per) {
			continue
		}
		if per > 1 {
			prefixes = append(prefixes, slot[0].pfx)
		} else {
			addrs = append(addrs, slot[0].addr)
		}
		e.ips = slices.Delete(e.ips, i, i+per)
		n.total -= per
	}
	return addrs, prefixes
}

// sweep deletes what was left of the cluster, five minutes old and attached
// nowhere.
func (n *awscni) sweep() {
	n.after(awsSweep, n.sweep)
	c := n.w.cloud
	n.call(describeInterfaces, func() code { return ok }, func(res code) {
		if res != ok {
			return
		}
		var leaked []*iface
		for _, e := range c.loose {
			if c.available(e) && c.clk.now-e.created > awsSweepAge {
				leaked = append(leaked, e)
			}
		}
		var next func(i int)
		next = func(i int) {
			if i < len(leaked) {
				n.call(deleteInterface, func() code { return c.delete(leaked[i]) }, func(code) { next(i + 1) })
			}
		}
		next(0)
	})
}

// add hands out any free address, or fails at once. Which one is the order of
// a Go map: any interface, any address.
func (n *awscni) add(p *pod) {
	if n.free() > 0 {
		now := n.w.clk.now
		from := n.w.cloud.rng.IntN(len(n.enis))
		for i := range n.enis {
			e := n.enis[(from+i)%len(n.enis)]
			if e.used == len(e.ips) {
				continue
			}
			first := n.w.cloud.rng.IntN(len(e.ips))
			for k := range e.ips {
				a := &e.ips[(first+k)%len(e.ips)]
				if !a.used && a.cool <= now {
					a.used = true
					e.used++
					n.used++
					n.w.up(p, a.addr)
					return
				}
			}
		}
	}
	n.w.failed(p, "no-address")
}

func (n *awscni) del(p *pod) {
	for _, e := range n.enis {
		for i := range e.ips {
			if a := &e.ips[i]; a.used && a.addr == p.addr {
				a.used, a.cool = false, n.w.clk.now+awsCooldown
				e.used--
				n.used--
				return
			}
		}
	}
}

func (n *awscni) quit(*pod) {} // an ADD ends at once

// The SDK's standard retries (aws-sdk-go-v2, aws/retry): three attempts, and a
// quota of tokens that failures use up.
const (
	attempts    = 3
	retryTokens = 500
	retryCost   = 5
	retryGain   = 1
)

type retryer struct{ tokens int }

// call makes a call with the SDK's retries.
func (n *awscni) call(a action, apply func() code, done func(code)) { n.attempt(a, 1, 0, apply, done) }

func (n *awscni) attempt(a action, try, paid int, apply func() code, done func(code)) {
	if !n.h.alive {
		return
	}
	n.w.cloud.call(a, apply, func(res code) {
		if !n.h.alive {
			return
		}
		if res != throttled {
			n.sdk.tokens = min(retryTokens, n.sdk.tokens+paid+retryGain)
			done(res)
			return
		}
		if try == attempts || n.sdk.tokens < retryCost {
			done(res)
			return
		}
		n.sdk.tokens -= retryCost
		// A random share of 1 s, then of 2 s.
		wait := time.Duration(n.w.cloud.rng.Int64N(int64(time.Second << (try - 1))))
		n.after(wait, func() { n.attempt(a, try+1, retryCost, apply, done) })
	})
}

// AWSKnobs are the AWS VPC CNI's settings.
type AWSKnobs struct {
	WarmENI    int `json:"warmENITarget"`
	WarmIP     int `json:"warmIPTarget"`
	MinimumIP  int `json:"minimumIPTarget"`
	WarmPrefix int `json:"warmPrefixTarget"` // with prefixes alone

	// LinkWait is how long it takes to find and set up the link of a new
	// interface once IMDS lists it. It looks again after 3 s if the link is not
	// there; with that once per interface the model agrees with what was
	// measured, without it the model is a third faster.
	LinkWait time.Duration `json:"linkWaitNs"`
}

// byIP reports whether addresses are counted, and not interfaces or prefixes.
func (k *AWSKnobs) byIP() bool { return k.WarmIP > 0 || k.MinimumIP > 0 }
