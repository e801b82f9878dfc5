// Package plan does the arithmetic of capacity: how many pods an instance type
// takes, what nodes and pods hold of which subnets under Underlay and under
// the AWS VPC CNI as it comes, and when a subnet is full.
//
// It is pure, and its figures are those of a settled cluster: every pod has
// its address, what is surplus was given back. What happens on the way there
// is for the simulator to say.
package plan
