package api

import (
	"context"
	"errors"
	"iter"
	"regexp"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/flow"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) flowLogHandlers(h map[string]query.Handler) {
	h["CreateFlowLogs"] = handle("CreateFlowLogs",
		"ResourceId ResourceType TrafficType LogDestinationType LogDestination LogFormat MaxAggregationInterval DestinationOptions ClientToken TagSpecification", a.createFlowLogs)
	h["DeleteFlowLogs"] = handle("DeleteFlowLogs", "FlowLogId", a.deleteFlowLogs)
	h["DescribeFlowLogs"] = handle("DescribeFlowLogs", "FlowLogId Filter NextToken MaxResults", a.describeFlowLogs)
}

const (
	// maxFlowLogs is how many flow logs a resource may have (VPC User Guide,
	// "Flow logs", 2026).
	maxFlowLogs = 250

	defaultInterval = 600 // seconds
	shortInterval   = 60

	plainText = "plain-text"
	toS3      = "s3"
)

// flowResources are the types of what a flow log can be of, with the prefix of
// their ids.
var flowResources = map[string]string{"VPC": "vpc", "Subnet": "subnet", "NetworkInterface": "eni"}

// bucketARN is an S3 bucket, and below it a folder.
var bucketARN = regexp.MustCompile(`^arn:aws:s3:::[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9!_.*'()/-]*)?$`)

// parseFlowLog reads all of a request but its resources.
func parseFlowLog(req *query.CreateFlowLogsRequest) (store.FlowLog, error) {
	f := store.FlowLog{
		Traffic: deref(req.TrafficType), DestinationType: deref(req.LogDestinationType), Destination: deref(req.LogDestination),
		Format: flow.Default, Interval: defaultInterval, FileFormat: plainText, ClientToken: deref(req.ClientToken),
	}
	switch {
	case flowResources[*req.ResourceType] == "":
		return f, query.Errorf("UnsupportedOperation", "There are no resources of the type %s here.", *req.ResourceType)
	case f.Traffic == "":
		return f, query.Errorf("MissingParameter", "The request must contain the parameter trafficType")
	case f.DestinationType != toS3:
		return f, query.Errorf("UnsupportedOperation", "The only destination of flow logs is s3. Give LogDestinationType s3, and the ARN of a bucket as LogDestination.")
	case !bucketARN.MatchString(f.Destination):
		return f, query.Errorf("InvalidParameterValue", "LogDestination %q is not the ARN of a bucket or of a folder in it: arn:aws:s3:::bucket/folder/", f.Destination)
	case slices.Contains(strings.Split(f.Destination, "/")[1:], "AWSLogs"):
		return f, query.Errorf("InvalidParameterValue", "LogDestination may not have a folder AWSLogs: that is a reserved term")
	}
	if req.LogFormat != nil {
		f.Format = *req.LogFormat
		if _, err := flow.ParseFormat(f.Format); err != nil {
			return f, query.Errorf("InvalidParameterValue", "LogFormat is invalid: %v", err)
		}
	}
	if req.MaxAggregationInterval != nil {
		if f.Interval = int(*req.MaxAggregationInterval); f.Interval != shortInterval && f.Interval != defaultInterval {
			return f, query.Errorf("InvalidParameterValue", "Invalid value for MaxAggregationInterval. Valid values: [%d, %d]", shortInterval, defaultInterval)
		}
	}
	if o := req.DestinationOptions; o != nil {
		if o.FileFormat != nil {
			f.FileFormat = *o.FileFormat
		}
		f.HivePartitions, f.HourPartitions = deref(o.HiveCompatiblePartitions), deref(o.PerHourPartition)
	}
	return f, nil
}

// same reports whether two flow logs write the same to the same place.
func same(x, y *store.FlowLog) bool {
	return x.Resource == y.Resource && x.Destination == y.Destination && x.Traffic == y.Traffic && x.Format == y.Format
}

// createFlowLogs makes a flow log of each resource; those that cannot have it
// are told one by one, and the others have it.
func (a *API) createFlowLogs(_ context.Context, req *query.CreateFlowLogsRequest) (*query.CreateFlowLogsResponse, error) {
	proto, err := parseFlowLog(req)
	if err != nil {
		return nil, err
	}
	tags, err := specified(req.TagSpecification, "vpc-flow-log")
	if err != nil {
		return nil, err
	}
	params := *req
	params.ClientToken, params.DryRun = nil, nil
	resp := &query.CreateFlowLogsResponse{ClientToken: req.ClientToken, FlowLogIdSet: []string{}, Unsuccessful: []query.UnsuccessfulItem{}}
	_, err = a.update(func(tx *store.Tx) error {
		before, err := once(tx, "CreateFlowLogs", req.ClientToken, params)
		if err != nil || before != nil {
			resp.FlowLogIdSet = before
			return err
		}
		for _, id := range req.ResourceId {
			f := proto
			f.ID, f.Resource, f.Created = vpc.NewID("fl"), id, a.now()
			if err := a.checkFlowLog(&tx.State, &f, flowResources[*req.ResourceType]); err != nil {
				resp.Unsuccessful = append(resp.Unsuccessful, unsuccessful(id, err))
				continue
			}
			tx.PutFlowLog(&f)
			tx.SetTags(f.ID, tags["vpc-flow-log"])
			resp.FlowLogIdSet = append(resp.FlowLogIdSet, f.ID)
		}
		return remember(tx, "CreateFlowLogs", req.ClientToken, params, a.now(), resp.FlowLogIdSet)
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// checkFlowLog returns an error unless the resource exists and may have the
// flow log.
func (a *API) checkFlowLog(s *store.State, f *store.FlowLog, prefix string) error {
	if err := checkID(prefix, f.Resource); err != nil {
		return err
	}
	if err := resource(s, f.Resource); err != nil {
		return err
	}
	n := 0
	for _, o := range s.FlowLogs.All() {
		if same(o, f) {
			return query.Errorf("FlowLogAlreadyExists", "Error. There is an existing Flow Log with the same configuration and log destination.")
		}
		if o.Resource == f.Resource {
			n++
		}
	}
	if n >= maxFlowLogs {
		return quotaReached("FlowLogsLimitExceeded", "flow logs of the resource", maxFlowLogs)
	}
	return nil
}

// unsuccessful describes why something was not done to one of several.
func unsuccessful(id string, err error) query.UnsuccessfulItem {
	reason := &query.StateReason{Code: new("InternalError"), Message: new(err.Error())}
	if e := new(query.Error); errors.As(err, &e) {
		reason.Code, reason.Message = &e.Code, &e.Message
	}
	return query.UnsuccessfulItem{ResourceId: &id, Error: reason}
}

func findFlowLog(s *store.State, id string) (*store.FlowLog, error) {
	if err := checkID("fl", id); err != nil {
		return nil, err
	}
	if f := s.FlowLog(id); f != nil {
		return f, nil
	}
	return nil, query.Errorf("InvalidFlowLogId.NotFound", "The flow log ID '%s' does not exist", id)
}

func (a *API) deleteFlowLogs(_ context.Context, req *query.DeleteFlowLogsRequest) (*query.DeleteFlowLogsResponse, error) {
	resp := &query.DeleteFlowLogsResponse{Unsuccessful: []query.UnsuccessfulItem{}}
	_, err := a.update(func(tx *store.Tx) error {
		for _, id := range req.FlowLogId {
			f, err := findFlowLog(&tx.State, id)
			if err != nil {
				resp.Unsuccessful = append(resp.Unsuccessful, unsuccessful(id, err))
				continue
			}
			tx.DeleteFlowLog(f.ID)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (v view) flowLog(f *store.FlowLog) query.FlowLog {
	out := query.FlowLog{
		FlowLogId: &f.ID, ResourceId: &f.Resource, TrafficType: &f.Traffic, LogDestinationType: &f.DestinationType, LogDestination: &f.Destination,
		LogFormat: &f.Format, MaxAggregationInterval: integer(f.Interval), CreationTime: moment(f.Created), FlowLogStatus: new("ACTIVE"),
		TagSet:             v.tags(f.ID),
		DestinationOptions: &query.DestinationOptions{FileFormat: &f.FileFormat, HiveCompatiblePartitions: &f.HivePartitions, PerHourPartition: &f.HourPartitions},
	}
	if status, message := v.api.delivered(f.ID); status != "" {
		out.DeliverLogsStatus = &status
		if message != "" {
			out.DeliverLogsErrorMessage = &message
		}
	}
	return out
}

var flowLogListing = listing[*store.FlowLog]{
	action: "DescribeFlowLogs",
	all:    func(v view) iter.Seq2[string, *store.FlowLog] { return entries(v.FlowLogs) },
	find:   findFlowLog,
	key:    func(f *store.FlowLog) string { return f.ID },
	attrs: attributes[*store.FlowLog]{
		"deliver-log-status": func(v view, f *store.FlowLog) []string {
			if status, _ := v.api.delivered(f.ID); status != "" {
				return []string{status}
			}
			return nil // until something is delivered
		},
		"flow-log-id":          value(func(f *store.FlowLog) string { return f.ID }),
		"log-destination-type": value(func(f *store.FlowLog) string { return f.DestinationType }),
		"log-group-name":       func(view, *store.FlowLog) []string { return nil },
		"resource-id":          value(func(f *store.FlowLog) string { return f.Resource }),
		"traffic-type":         value(func(f *store.FlowLog) string { return f.Traffic }),
	},
}

func (a *API) describeFlowLogs(_ context.Context, req *query.DescribeFlowLogsRequest) (*query.DescribeFlowLogsResponse, error) {
	v := a.read()
	found, next, err := flowLogListing.page(v, req.FlowLogId, req.Filter, req.NextToken, req.MaxResults)
	if err != nil {
		return nil, err
	}
	return &query.DescribeFlowLogsResponse{NextToken: next, FlowLogSet: collect(found, v.flowLog)}, nil
}
