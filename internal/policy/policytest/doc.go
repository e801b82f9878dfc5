// Package policytest makes worlds of rules, pods and flows at random, for tests
// that compare one judge of package policy with another. Numbers come from the
// caller's source alone: a seed is a world.
package policytest
