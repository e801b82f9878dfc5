package vpc

import "testing"

func TestFlowFields(t *testing.T) {
	fields := FlowFields()
	if len(fields) != 14+7+4+4+10+1 {
		t.Errorf("%d fields", len(fields))
	}
	for name, want := range map[string]FlowField{
		"srcport":             {"srcport", 2, FlowInt32},
		"bytes":               {"bytes", 2, FlowInt64},
		"tcp-flags":           {"tcp-flags", 3, FlowInt32},
		"az-id":               {"az-id", 4, FlowString},
		"pkt-dst-aws-service": {"pkt-dst-aws-service", 5, FlowString},
		"traffic-path":        {"traffic-path", 5, FlowInt32},
		"reject-reason":       {"reject-reason", 8, FlowString},
	} {
		if fields[name] != want {
			t.Errorf("%s: %+v, want %+v", name, fields[name], want)
		}
	}
	if c := fields["pkt-dst-aws-service"].Column(); c != "pkt_dst_aws_service" {
		t.Errorf("column %s", c)
	}
	delete(fields, "version")
	if _, ok := FlowFields()["version"]; !ok {
		t.Error("the map is shared")
	}
}
