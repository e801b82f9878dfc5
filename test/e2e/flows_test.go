package e2e

import (
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

// What a pod does is in the VPC's flow log under the pod's own address, and
// underlay flows knows it by its name.
func TestFlowLogKnowsThePod(t *testing.T) {
	l := lab.Up(t)
	var made struct{ FlowLogIds []string }
	l.AWS(&made, "ec2", "create-flow-logs", "--resource-type", "VPC", "--resource-ids", l.VPCID, "--traffic-type", "ALL", "--log-destination-type", "s3",
		"--log-destination", "arn:aws:s3:::logs/lab/", "--log-format", "${srcaddr} ${pkt-srcaddr} ${pkt-dstaddr} ${dstport} ${action} ${flow-direction} ${tcp-flags}")
	if len(made.FlowLogIds) != 1 {
		t.Fatalf("made %v", made)
	}
	web := l.Run("web", "--node", l.Nodes[0].Name)
	db, vm := l.OutsideIP("db-1"), l.OutsideIP("vm-1")
	if said := l.Underlay("exec", "web", "--", "bash", "-c", "cat < /dev/tcp/"+db.String()+"/5432"); !strings.Contains(said, web.IP.String()) {
		t.Errorf("the database says %q", said)
	}
	// The VM answers on port 8080 alone, by its group.
	if _, _, code := l.Try("exec", "web", "--", "timeout", "0.3", "bash", "-c", "echo > /dev/tcp/"+vm.String()+"/22"); code == 0 {
		t.Error("the VM's port 22 is open")
	}
	table := l.Underlay("flows", "--pod", "web")
	for _, want := range []string{" (web) ", db.String() + ":5432 (db-1)", "REJECT", "security-group", vm.String() + ":22 (vm-1)"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
	if aws := l.Underlay("flows", "-o", "aws", "--action", "REJECT", "--format", "${pkt-srcaddr} ${dstaddr} ${dstport} ${instance-id}"); !strings.Contains(aws, web.IP.String()+" "+vm.String()+" 22 i-") {
		t.Errorf("as AWS has it: %s", aws)
	}

	l.Chaos("--flow-interval", "1s", "--file-interval", "1s")
	node := l.Nodes[0].IP.String()
	want := []string{
		node + " " + web.IP.String() + " " + db.String() + " 5432 ACCEPT egress 3",
		web.IP.String() + " " + web.IP.String() + " " + db.String() + " 5432 ACCEPT ingress 3",
		web.IP.String() + " " + web.IP.String() + " " + vm.String() + " 22 REJECT ingress 2",
	}
	var got string
	for deadline := time.Now().Add(10 * time.Second); ; <-time.After(50 * time.Millisecond) {
		got = flowLog(t, filepath.Join(l.Dir(), "vpcd/s3/logs/lab/AWSLogs"))
		missing := ""
		for _, w := range want {
			if !strings.Contains("\n"+got, "\n"+w+"\n") {
				missing = w
			}
		}
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no line %q in\n%s", missing, got)
		}
	}
}

// flowLog is what is in all flow log files below a folder.
func flowLog(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".log.gz") {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		z, err := gzip.NewReader(f)
		if err != nil {
			return err
		}
		_, err = io.Copy(&out, z)
		return err
	})
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return out.String()
}
