// Package lab brings a lab up with the built commands, as a user would, and
// lets a test or a benchmark work in it: run pods, send traffic, kill processes,
// ask EC2 and the agents.
//
// Each lab is named t<pid><letter>, so that a later run finds and removes what a
// killed one left. Traffic stays between addresses inside such labs.
package lab
