package agent

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

func TestBesideTheAWSAgentNothingIsServed(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.setRival("process aws-k8s-agent, pid 7")
		r.start()
		_, err := r.add("c1")
		wantCode(t, err, agentapi.CodeTryAgain, "Cordon and drain")
		wantCode(t, r.a.Status(r.t.Context()), agentapi.CodeNotAvailable, "pid 7")
		time.Sleep(time.Hour)
		if n := r.cloud.written(); n != 0 {
			t.Errorf("%d writes to EC2", n)
		}
		r.setRival("")
		time.Sleep(2 * rivalPoll)
		r.mustAdd("c1")
	})
}

func TestAWSAgentThatComesLaterEndsOurs(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		a := New(Options{Version: "test", Cluster: "test", Socket: r.socket, Datapath: r.kernel, Metadata: fakeIMDS{r.cloud},
			ConnectEC2: func(context.Context, string) (EC2, error) { return r.cloud, nil }, Logger: slog.New(slog.DiscardHandler), Rival: r.theRival})
		ended := make(chan error, 1)
		go func() { ended <- a.Run(r.t.Context()) }()
		r.a = a
		r.mustAdd("c1")
		r.setRival("it answers on 127.0.0.1:61679")
		if err := <-ended; !errors.Is(err, errRival) || !strings.Contains(err.Error(), "61679") {
			t.Errorf("the agent ended with %v", err)
		}
		_, err := r.add("c2")
		wantCode(t, err, agentapi.CodeTryAgain, "stopping")
	})
}

func TestSweepDeletesWhatDeadNodesLeft(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		old := time.Now().Add(-time.Hour).UTC().Format(time.RFC3339)
		left := func(instance, made, cluster string, more ...string) vpc.ENIID {
			e := r.cloud.make()
			e.Tags = map[string]string{ipam.TagCluster: cluster, ipam.TagInstance: instance, tagCreated: made}
			for i := 0; i < len(more); i += 2 {
				e.Tags[more[i]] = more[i+1]
			}
			return e.ID
		}
		dead := []vpc.ENIID{left("i-dead", old, "test"), left("i-dead", old, "test"), left("i-dead2", old, "test")}
		kept := map[vpc.ENIID]string{
			left("i-alive", old, "test"):                                                 "a living node's",
			left("i-dead", old, "other"):                                                 "another cluster's",
			left("i-dead", old, "test", ipam.TagNoManage, "true"):                        "no_manage",
			left("i-dead", time.Now().Add(time.Hour).UTC().Format(time.RFC3339), "test"): "too young",
			left("i-dead", "yesterday", "test"):                                          "of unknown age",
			left("", old, "test"):                                                        "nobody's",
		}
		attached := left("i-alive", old, "test")
		r.cloud.enis[attached].Instance = "i-dead"
		kept[attached] = "attached"
		r.sweep = 10 * time.Minute
		r.start()
		time.Sleep(14 * time.Minute) // one round: what it sees is not deleted yet
		synctest.Wait()
		for _, id := range dead {
			if r.cloud.enis[id] == nil {
				t.Errorf("%s was deleted when it was first seen", id)
			}
		}
		r.cloud.setFail(func(call string) error {
			if call == "delete" {
				return apiError("RequestLimitExceeded")
			}
			return nil
		})
		time.Sleep(13 * time.Minute)
		r.cloud.setFail(nil)
		time.Sleep(13 * time.Minute)
		synctest.Wait()
		for _, id := range dead {
			if r.cloud.enis[id] != nil {
				t.Errorf("%s, left by a dead node, is still there", id)
			}
		}
		for id, why := range kept {
			if r.cloud.enis[id] == nil {
				t.Errorf("%s was deleted, which is %s", id, why)
			}
		}
		if len(r.inspect().LastErrors) == 0 {
			t.Error("the refused deletion was not reported")
		}
	})
}
