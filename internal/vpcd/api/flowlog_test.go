package api

import (
	"testing"

	"github.com/underlay-cni/underlay/internal/vpcd/flow"
)

func TestFlowLogs(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	eni := w.eni(subnet)
	create := func(params ...string) []string {
		return append([]string{"TrafficType=ALL", "LogDestinationType=s3"}, params...)
	}
	d := w.must("CreateFlowLogs", create("ResourceType=VPC", "ResourceId.1="+vpcID, "ResourceId.2=vpc-00000000000000000", "LogDestination=arn:aws:s3:::logs/all/", "ClientToken=tok",
		"TagSpecification.1.ResourceType=vpc-flow-log", "TagSpecification.1.Tag.1.Key=k", "TagSpecification.1.Tag.1.Value=v")...)
	id := d.get("flowLogIdSet")
	w.want(d, "unsuccessful.resourceId", "vpc-00000000000000000")
	w.want(d, "unsuccessful.error.code", "InvalidVpcID.NotFound")
	again := w.must("CreateFlowLogs", create("ResourceType=VPC", "ResourceId.1="+vpcID, "ResourceId.2=vpc-00000000000000000", "LogDestination=arn:aws:s3:::logs/all/", "ClientToken=tok",
		"TagSpecification.1.ResourceType=vpc-flow-log", "TagSpecification.1.Tag.1.Key=k", "TagSpecification.1.Tag.1.Value=v")...)
	w.want(again, "flowLogIdSet", id)
	const s = "flowLogSet."
	d = w.must("DescribeFlowLogs", "Filter.1.Name=resource-id", "Filter.1.Value.1="+vpcID)
	w.want(d, s+"flowLogId", id)
	w.want(d, s+"logFormat", flow.Default)
	w.want(d, s+"maxAggregationInterval", "600")
	w.want(d, s+"flowLogStatus", "ACTIVE")
	w.want(d, s+"destinationOptions.fileFormat", "plain-text")
	w.want(d, s+"tagSet.value", "v")
	w.want(w.must("CreateFlowLogs", create("ResourceType=VPC", "ResourceId.1="+vpcID, "LogDestination=arn:aws:s3:::logs/all/")...), "unsuccessful.error.code", "FlowLogAlreadyExists")

	w.must("CreateFlowLogs", create("ResourceType=NetworkInterface", "ResourceId.1="+eni, "LogDestination=arn:aws:s3:::logs", "MaxAggregationInterval=60",
		"LogFormat=${pkt-srcaddr} ${pkt-dstaddr} ${reject-reason}", "DestinationOptions.FileFormat=parquet", "DestinationOptions.HiveCompatiblePartitions=true", "DestinationOptions.PerHourPartition=true")...)
	w.must("CreateFlowLogs", create("ResourceType=Subnet", "ResourceId.1="+subnet, "LogDestination=arn:aws:s3:::logs")...)
	w.restart()
	d = w.must("DescribeFlowLogs", "Filter.1.Name=resource-id", "Filter.1.Value.1="+eni)
	w.want(d, s+"logFormat", "${pkt-srcaddr} ${pkt-dstaddr} ${reject-reason}")
	w.want(d, s+"destinationOptions.fileFormat", "parquet")
	w.want(d, s+"destinationOptions.perHourPartition", "true")

	for _, c := range []struct {
		code   string
		params []string
	}{
		{"UnsupportedOperation", []string{"ResourceType=TransitGateway", "ResourceId.1=tgw-1", "TrafficType=ALL", "LogDestinationType=s3", "LogDestination=arn:aws:s3:::logs"}},
		{"UnsupportedOperation", []string{"ResourceType=VPC", "ResourceId.1=" + vpcID, "TrafficType=ALL"}},
		{"UnsupportedOperation", []string{"ResourceType=VPC", "ResourceId.1=" + vpcID, "TrafficType=ALL", "LogGroupName=g", "DeliverLogsPermissionArn=arn:aws:iam::123456789012:role/r"}},
		{"MissingParameter", []string{"ResourceType=VPC", "ResourceId.1=" + vpcID, "LogDestinationType=s3", "LogDestination=arn:aws:s3:::logs"}},
		{"InvalidParameterValue", create("ResourceType=VPC", "ResourceId.1="+vpcID, "LogDestination=s3://logs")},
		{"InvalidParameterValue", create("ResourceType=VPC", "ResourceId.1="+vpcID, "LogDestination=arn:aws:s3:::logs/AWSLogs/")},
		{"InvalidParameterValue", create("ResourceType=VPC", "ResourceId.1="+vpcID, "LogDestination=arn:aws:s3:::logs", "MaxAggregationInterval=61")},
		{"InvalidParameterValue", create("ResourceType=VPC", "ResourceId.1="+vpcID, "LogDestination=arn:aws:s3:::logs", "LogFormat=${colour}")},
		{"UnsupportedOperation", create("ResourceType=VPC", "ResourceId.1="+vpcID, "LogDestination=arn:aws:s3:::logs", "TagFieldSpecification.1.ResourceType=instance")},
	} {
		w.fails(c.code, "CreateFlowLogs", c.params...)
	}
	d = w.must("DeleteFlowLogs", "FlowLogId.1="+id, "FlowLogId.2=fl-00000000000000000")
	w.want(d, "unsuccessful.resourceId", "fl-00000000000000000")
	w.want(d, "unsuccessful.error.code", "InvalidFlowLogId.NotFound")
	w.fails("InvalidFlowLogId.NotFound", "DescribeFlowLogs", "FlowLogId.1="+id)
}
