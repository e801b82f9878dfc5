// Package vpc holds the nouns of a VPC that everything else shares: typed
// identifiers, the elastic network interface, the subnet, what each instance
// type may hold, and the fields of flow log records.
//
// It is the ground floor: standard library only, no I/O, no clock. Values are
// plain data; a value that was handed over is not changed afterwards.
package vpc
