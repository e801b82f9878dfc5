// Package store keeps what the VPC is: the objects that the EC2 API made, held
// in memory as immutable snapshots and written through to one bbolt file.
//
//	Update(fn) ── fn changes a Tx (a private copy) ── bbolt commit ── snapshot published ── Changed
//	View()     ── the newest published snapshot (one atomic load)
//	At(t)      ── the snapshot that was newest at time t, as far back as KeepHistory asks for
//
// # Invariants
//
//   - A snapshot never changes. Its tables are persistent search trees: an
//     update copies the few nodes on the path to what it changes, whatever the
//     size of the table. Objects are handed out as pointers and must not be
//     written to; whoever changes one copies it first and puts the copy.
//   - An update is on file before it can be seen and before Update returns nil.
//     When fn or the commit fails nothing changes at all.
//   - What can be derived is not stored: which addresses of a subnet are in
//     use, which interface has a MAC, an attachment or an address, what falls
//     due when. Those indices live in the snapshot, are maintained by the same
//     Put and Delete calls, and are rebuilt from the objects on Open. There is
//     no second truth about addresses.
//   - No address and no MAC of a VPC belongs to two interfaces: a transaction
//     that tries is refused as a whole with ErrConflict.
//   - Each VPC has one main route table and one default network ACL, which come
//     and go with it; each subnet is tied to one network ACL, and to one route
//     table at most; an Elastic IP leads to an address that its interface has.
//
// # Durability
//
// The file is written with NoSync: the pages go to the kernel, in bbolt's
// order, but are not flushed to the disk. A process killed at any point, by
// SIGKILL too, loses no acknowledged update, because the page cache outlives
// it. A power loss or a kernel crash may lose or damage the file; the networks
// that it describes are namespaces of that kernel and are gone with it.
//
// # Concurrency
//
// All methods of Store may be called from any goroutine. Updates run one at a
// time; views never wait for them.
package store
