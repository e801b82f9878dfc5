package e2e

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"k8s.io/component-base/logs"
	_ "k8s.io/component-base/logs/testinit" // its flags are part of the framework's
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/test/e2e/framework"
	"k8s.io/kubernetes/test/e2e/framework/config"
	"k8s.io/kubernetes/test/e2e/framework/testfiles"
	e2etestingmanifests "k8s.io/kubernetes/test/e2e/testing-manifests"

	// Labels and features are declared there, before any spec uses them.
	_ "k8s.io/kubernetes/test/e2e/feature"

	// What the specs are.
	_ "k8s.io/kubernetes/test/e2e/common/network"
	_ "k8s.io/kubernetes/test/e2e/network"

	// After a failed spec: its namespace's events and pods, in the report.
	_ "k8s.io/kubernetes/test/e2e/framework/debug/init"
	// After each spec: all nodes are still Ready.
	_ "k8s.io/kubernetes/test/e2e/framework/node/init"
)

const suiteName = "Kubernetes network specs"

var (
	list         = flag.Bool("list", false, "print the full names of the network specs, one a line, and end")
	specsFile    = flag.String("specs", "", "`FILE` with the full names of the specs to run, one a line; without it Ginkgo's own flags select")
	progressFile = flag.String("progress", "", "`FILE` to which each finished spec appends one line of JSON: name, state, seconds, message, process")
)

func TestMain(m *testing.M) {
	config.CopyFlags(config.Flags, flag.CommandLine)
	framework.RegisterCommonFlags(flag.CommandLine)
	framework.RegisterClusterFlags(flag.CommandLine)
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "arguments that are no flags: %q\n", flag.Args())
		os.Exit(2)
	}
	if *list {
		printNames()
		return
	}
	testfiles.AddFileSource(e2etestingmanifests.GetE2ETestingManifestsFS())
	framework.AfterReadingAllFlags(&framework.TestContext)
	// Only now: the framework has just had Ginkgo walk through all specs without
	// running them, which takes what was registered before for itself.
	if *progressFile != "" {
		ginkgo.ReportAfterEach(report)
	}
	os.Exit(m.Run())
}

// TestNetwork runs the specs; in a parallel run each of Ginkgo's processes does.
func TestNetwork(t *testing.T) {
	logs.InitLogs()
	defer logs.FlushLogs()
	klog.EnableContextualLogging(true)
	gomega.RegisterFailHandler(framework.Fail)
	suite, reporter := framework.CreateGinkgoConfig()
	if *specsFile != "" {
		names, err := readNames(*specsFile)
		if err != nil {
			t.Fatal(err)
		}
		suite.FocusStrings, suite.SkipStrings, suite.LabelFilter = focus(names), nil, ""
	}
	ginkgo.RunSpecs(t, suiteName, suite, reporter)
}

// printNames prints what -specs understands. Packages that the network's link
// bring specs of other groups along; those are none of ours.
func printNames() {
	report := ginkgo.PreviewSpecs(suiteName)
	var names []string
	for _, r := range report.SpecReports {
		if name := r.FullText(); r.LeafNodeType == types.NodeTypeIt && strings.HasPrefix(name, "[sig-network] ") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	fmt.Println(strings.Join(names, "\n"))
}

// readNames returns the lines of a file that are not empty.
func readNames(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read -specs: %w", err)
	}
	defer f.Close()
	var names []string
	s := bufio.NewScanner(f)
	for s.Scan() {
		if name := strings.TrimSpace(s.Text()); name != "" {
			names = append(names, name)
		}
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("read -specs: %w", err)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("-specs %s names no spec", path)
	}
	return names, nil
}

// focus returns the expressions that match the specs of these names and no
// other. Ginkgo matches against the suite's name, a space, and the spec's.
func focus(names []string) []string {
	exprs := make([]string, len(names))
	for i, name := range names {
		exprs[i] = "^" + regexp.QuoteMeta(suiteName+" "+name) + "$"
	}
	return exprs
}

// The first process waits until the cluster can be judged at all: nodes
// schedulable, what runs in kube-system ready. Images are not pulled beforehand:
// the nodes have them.
var _ = ginkgo.SynchronizedBeforeSuite(prepare, learn)

// progressLine is one finished spec.
type progressLine struct {
	Name    string  `json:"name"`
	State   string  `json:"state"` // Ginkgo's: passed, failed, skipped, timedout, panicked, interrupted, aborted
	Seconds float64 `json:"seconds"`
	Message string  `json:"message,omitempty"` // of a failure or a skip
	Process int     `json:"process"`           // of Ginkgo's, from 1
}

// report appends a finished spec to the progress file. A line is one write(2)
// with O_APPEND, so that processes do not mix theirs.
func report(r ginkgo.SpecReport) {
	// What the selection leaves out is reported as skipped, too, and never ran.
	if (r.State.Is(types.SpecStateSkipped) && r.Failure.Message == "") || r.State.Is(types.SpecStatePending) {
		return
	}
	line, err := json.Marshal(progressLine{
		Name: r.FullText(), State: r.State.String(), Seconds: r.RunTime.Round(time.Millisecond).Seconds(),
		Message: r.Failure.Message, Process: r.ParallelProcess,
	})
	if err != nil {
		framework.Failf("encode progress: %v", err)
	}
	f, err := os.OpenFile(*progressFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		framework.Failf("write -progress: %v", err)
	}
	defer f.Close()
	if _, err := f.Write(append(line, '\n')); err != nil {
		framework.Failf("write -progress: %v", err)
	}
}
