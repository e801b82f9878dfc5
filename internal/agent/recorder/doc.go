// Package recorder keeps a node's flow records: it takes a sample of the
// datapath each interval, has [flowlog] make records of it, writes them to
// files, and holds the latest ones for who asks.
//
//	DIR/flows-000007.log   lines, in the order of time; the highest number grows
//	DIR/position.json      how far that file is valid, and the flowlog.Log then
//	DIR/position-3.log     how both went on since, a line for each interval
//
// The position moves on after the lines are in the file: by a line of what has
// changed, so that a hundred thousand idle connections are not written each
// minute; and when these lines are as long as the position, that is replaced by a
// rename, and the lines begin anew under its next number. So a
// process that was killed between the two leaves lines that the position does
// not know: the next one cuts them off and records the same packets anew. No
// packet is in the files twice, and none is left out, whenever the agent dies.
// (A power loss takes the node's counters with it.)
//
// All methods are safe for concurrent use.
package recorder
