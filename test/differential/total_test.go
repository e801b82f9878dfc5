package differential

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
)

// logFlows has the flow logs of a world's VPCs written below Options.Dir.
func (w *watched) logFlows() error {
	for v := range w.cloud.world.VPCs {
		if err := w.cloud.do("CreateFlowLogs", "ResourceType", "VPC", "ResourceId.1", id(w.cloud, v), "TrafficType", "ALL", "LogDestinationType", "s3",
			"LogDestination", "arn:aws:s3:::kills", "MaxAggregationInterval", "60",
			"LogFormat", "${interface-id} ${flow-direction} ${action} ${packets} ${bytes} ${log-status}"); err != nil {
			return err
		}
	}
	return nil
}

// flowTotals compares what flow logs have of all interfaces with what these counted.
type flowTotals struct {
	*killable
	err        error
	wrong      string // the first difference, "" if there is none
	files      int
	packets    uint64
	interfaces int
	skipped    int // interfaces
}

// total of an interface's direction.
type total struct{ packets, bytes uint64 }

type direction struct {
	eni    string
	egress bool
}

func (f *flowTotals) read(worlds []*watched) error {
	f.files, f.packets, f.interfaces, f.skipped, f.wrong = 0, 0, 0, 0, ""
	logs, skips := map[direction]total{}, map[string]bool{}
	f.err = filepath.WalkDir(filepath.Join(f.options.Dir, "s3", "kills"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".log.gz") {
			return err
		}
		f.files++
		return readLog(path, logs, skips)
	})
	if f.err != nil {
		return f.err
	}
	var counters map[vpc.ENIID]fabric.Counters
	if f.err = f.admin(http.MethodGet, "counters", nil, &counters); f.err != nil {
		return f.err
	}
	for _, w := range worlds {
		for name := range w.cloud.world.ENIs {
			eni := w.cloud.ids[string(name)]
			c := counters[vpc.ENIID(eni)]
			out, in := logs[direction{eni, true}], logs[direction{eni, false}]
			f.interfaces++
			f.packets += out.packets + in.packets
			if skips[eni] {
				f.skipped++
			}
			for _, one := range []struct {
				what                    string
				logged                  total
				exempt, skipped, counts total
			}{
				{"sent", out, total{c.ExemptTxPackets, c.ExemptTxBytes}, total{c.SkippedTxPackets, c.SkippedTxBytes}, total{c.TxPackets, c.TxBytes}},
				{"received", in, total{c.ExemptRxPackets, c.ExemptRxBytes}, total{c.SkippedRxPackets, c.SkippedRxBytes}, total{c.RxPackets, c.RxBytes}},
			} {
				sum := total{one.logged.packets + one.exempt.packets + one.skipped.packets, one.logged.bytes + one.exempt.bytes + one.skipped.bytes}
				if sum != one.counts {
					f.wrong = fmt.Sprintf("%s %s %v packets and bytes; its flow log has %v, exempt are %v, skipped %v", name, one.what, one.counts, one.logged, one.exempt, one.skipped)
				}
			}
		}
	}
	return nil
}

// readLog adds up what a file accepted, by interface and direction.
func readLog(path string, logs map[direction]total, skips map[string]bool) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	z, err := gzip.NewReader(file)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	lines := bufio.NewScanner(z)
	lines.Scan() // the header
	for lines.Scan() {
		var eni, way, action, status, packets, bytes string
		if _, err := fmt.Sscan(lines.Text(), &eni, &way, &action, &packets, &bytes, &status); err != nil {
			return fmt.Errorf("read %s, %q: %w", path, lines.Text(), err)
		}
		if status == "SKIPDATA" {
			skips[eni] = true
		}
		if status != "OK" || action != "ACCEPT" {
			continue
		}
		var n total
		if _, err := fmt.Sscan(packets, &n.packets); err != nil {
			return err
		}
		if _, err := fmt.Sscan(bytes, &n.bytes); err != nil {
			return err
		}
		k := direction{eni, way == "egress"}
		was := logs[k]
		logs[k] = total{was.packets + n.packets, was.bytes + n.bytes}
	}
	return lines.Err()
}
