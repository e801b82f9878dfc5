package api

import (
	"context"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

func (a *API) resetHandlers(h map[string]query.Handler) {
	h["ResetNetworkInterfaceAttribute"] = handle("ResetNetworkInterfaceAttribute", "NetworkInterfaceId SourceDestCheck", a.resetNetworkInterfaceAttribute)
	h["DescribeVpcBlockPublicAccessOptions"] = handle("DescribeVpcBlockPublicAccessOptions", "", a.describeVpcBlockPublicAccessOptions)
}

// resetNetworkInterfaceAttribute gives the one attribute that can be reset,
// whatever value the request gives it, its default: the check is on.
func (a *API) resetNetworkInterfaceAttribute(_ context.Context, req *query.ResetNetworkInterfaceAttributeRequest) (*query.ResetNetworkInterfaceAttributeResponse, error) {
	if req.SourceDestCheck == nil {
		return nil, query.Errorf("InvalidParameterCombination", "One attribute must be given: sourceDestCheck is the one that can be reset.")
	}
	_, err := a.update(func(tx *store.Tx) error {
		old, err := findENI(&tx.State, *req.NetworkInterfaceId)
		if err != nil {
			return err
		}
		if err := mine(old); err != nil {
			return err
		}
		e := *old
		e.SourceDestCheck = true
		tx.PutENI(&e)
		return nil
	})
	return nil, err
}

// describeVpcBlockPublicAccessOptions tells what is so: nothing is blocked, and
// nobody has changed that (ModifyVpcBlockPublicAccessOptions is not there).
func (a *API) describeVpcBlockPublicAccessOptions(context.Context, *query.DescribeVpcBlockPublicAccessOptionsRequest) (*query.DescribeVpcBlockPublicAccessOptionsResponse, error) {
	return &query.DescribeVpcBlockPublicAccessOptionsResponse{VpcBlockPublicAccessOptions: &query.VpcBlockPublicAccessOptions{
		AwsAccountId: &a.account, AwsRegion: &a.region, State: new("default-state"), InternetGatewayBlockMode: new("off"),
		ManagedBy: new("account"), ExclusionsAllowed: new("allowed"),
	}}, nil
}
