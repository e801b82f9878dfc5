// Package cli is the underlay command: it builds labs, runs pods in them and
// shows what is there.
//
// A lab is a VPC (vpcd), instances that are network namespaces, a node agent in
// some of them, and pods. What the command knows about a lab stands in its
// directory:
//
//	/run/underlay/NAME.lock        flock: up and down exclusive, run and rm shared
//	/run/underlay/NAME/lab.json    what up made; whole or absent (rename)
//	                  /bpf         a bpffs: every pin of the lab, gone with one unmount
//	                  /vpcd        vpcd's own state and log; vpcd.pid beside it
//	                  /nodes/NODE  agent.sock, agent.log, agent.pid, cni/
//	                  /outside/VM  the log of the small server on it
//	                  /pods/POD.*  what run made, the log of its process
//
// Invariants: nothing of a lab is named outside /run/underlay/NAME and
// /run/netns/ul-NAME-*, so that down finds all of it without any file of its
// own: processes are those that were recorded (pid and start time), those whose
// network namespace is one of the lab's, and those of our programs whose
// arguments name the lab's directory. Names are chosen so that no namespace of
// one lab can be taken for another's (see CheckLab).
//
// Nothing here runs as a service. Background processes get a session of their
// own and outlive the command and its terminal.
package cli
