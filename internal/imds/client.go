package imds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsimds "github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/underlay-cni/underlay/internal/vpc"
)

const (
	// maxItem bounds one metadata item, in bytes: the longest we read is a
	// list of 50 addresses.
	maxItem = 64 << 10
	timeout = 5 * time.Second
)

// Client reads the instance's own metadata.
type Client struct {
	api *awsimds.Client

	mu  sync.Mutex
	ids map[string]vpc.ENIID // by MAC: they never change
}

// New returns a client. An empty endpoint stands for 169.254.169.254, or what
// AWS_EC2_METADATA_SERVICE_ENDPOINT says.
func New(endpoint string) *Client {
	return &Client{
		api: awsimds.New(awsimds.Options{
			Endpoint: endpoint, EnableFallback: aws.FalseTernary, Retryer: aws.NopRetryer{}, ClientEnableState: awsimds.ClientEnabled,
			HTTPClient: &http.Client{Timeout: timeout, Transport: &http.Transport{MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute}},
		}),
		ids: map[string]vpc.ENIID{},
	}
}

// Identity is who the node is.
type Identity struct {
	Instance         vpc.InstanceID
	Type             string
	AvailabilityZone string
	ZoneID           string // the zone's name in all accounts, "use1-az1"
	Region           string
	Account          string // that owns the primary interface
	MAC              string // of the primary interface
	Addr             netip.Addr
	VPC              vpc.VPCID
	VPCCIDRs         []netip.Prefix
	Subnet           vpc.SubnetID
	SubnetCIDR       netip.Prefix
	Groups           []vpc.SecurityGroupID
	ENI              vpc.ENIID
}

// Identity reads who the node is.
func (c *Client) Identity(ctx context.Context) (Identity, error) {
	r := reader{c: c, ctx: ctx}
	id := Identity{
		Instance:         vpc.InstanceID(r.text("instance-id")),
		Type:             r.text("instance-type"),
		AvailabilityZone: r.text("placement/availability-zone"),
		ZoneID:           r.text("placement/availability-zone-id"),
		Region:           r.text("placement/region"),
		MAC:              r.text("mac"),
	}
	if r.err != nil {
		return id, r.err
	}
	m := "network/interfaces/macs/" + id.MAC + "/"
	id.Addr = first(list(&r, m+"local-ipv4s", netip.ParseAddr))
	id.VPC = vpc.VPCID(r.text(m + "vpc-id"))
	id.VPCCIDRs = list(&r, m+"vpc-ipv4-cidr-blocks", netip.ParsePrefix)
	id.Subnet = vpc.SubnetID(r.text(m + "subnet-id"))
	id.SubnetCIDR = first(list(&r, m+"subnet-ipv4-cidr-block", netip.ParsePrefix))
	id.Groups = list(&r, m+"security-group-ids", func(s string) (vpc.SecurityGroupID, error) { return vpc.SecurityGroupID(s), nil })
	id.ENI = vpc.ENIID(r.text(m + "interface-id"))
	id.Account = r.text(m + "owner-id")
	if r.err != nil {
		return id, r.err
	}
	if err := vpc.CheckID("i", string(id.Instance)); err != nil {
		return id, fmt.Errorf("read instance-id: %w", err)
	}
	if !id.Addr.IsValid() || !id.SubnetCIDR.IsValid() {
		return id, fmt.Errorf("read the addresses of %s: none listed", id.MAC)
	}
	return id, nil
}

// VPCCIDRs reads which IPv4 ranges the VPC has, of the interface with that MAC:
// ranges come and go while the node runs.
func (c *Client) VPCCIDRs(ctx context.Context, mac string) ([]netip.Prefix, error) {
	r := reader{c: c, ctx: ctx}
	cidrs := list(&r, "network/interfaces/macs/"+mac+"/vpc-ipv4-cidr-blocks", netip.ParsePrefix)
	return cidrs, r.err
}

// Interface is one interface as IMDS lists it.
type Interface struct {
	MAC       string
	ID        vpc.ENIID
	Device    int
	Addresses []netip.Addr // primary first
	Prefixes  []netip.Prefix
}

// Interfaces reads which addresses are live on which interface. An interface
// that comes or goes meanwhile may be left out.
func (c *Client) Interfaces(ctx context.Context) ([]Interface, error) {
	r := reader{c: c, ctx: ctx}
	macs := list(&r, "network/interfaces/macs/", func(s string) (string, error) { return strings.ToLower(strings.TrimSuffix(s, "/")), nil })
	if r.err != nil {
		return nil, r.err
	}
	var out []Interface
	for _, mac := range macs {
		m := "network/interfaces/macs/" + mac + "/"
		ir := reader{c: c, ctx: ctx}
		i := Interface{MAC: mac, ID: c.id(&ir, mac)}
		i.Device, _ = strconv.Atoi(ir.text(m + "device-number"))
		i.Addresses = list(&ir, m+"local-ipv4s", netip.ParseAddr)
		if ir.err != nil {
			if isNotFound(ir.err) {
				continue
			}
			return nil, ir.err
		}
		pr := reader{c: c, ctx: ctx}
		i.Prefixes = list(&pr, m+"ipv4-prefix", netip.ParsePrefix)
		if pr.err != nil && !isNotFound(pr.err) { // not found: the interface has none
			return nil, pr.err
		}
		out = append(out, i)
	}
	return out, nil
}

func (c *Client) id(r *reader, mac string) vpc.ENIID {
	c.mu.Lock()
	id := c.ids[mac]
	c.mu.Unlock()
	if id != "" {
		return id
	}
	id = vpc.ENIID(r.text("network/interfaces/macs/" + mac + "/interface-id"))
	if r.err == nil {
		c.mu.Lock()
		c.ids[mac] = id
		c.mu.Unlock()
	}
	return id
}

// reader reads items until the first error, which it keeps.
type reader struct {
	c   *Client
	ctx context.Context
	err error
}

func (r *reader) text(path string) string {
	if r.err != nil {
		return ""
	}
	out, err := r.c.api.GetMetadata(r.ctx, &awsimds.GetMetadataInput{Path: path})
	if err != nil {
		r.err = fmt.Errorf("read metadata %s: %w", path, err)
		return ""
	}
	defer out.Content.Close()
	b, err := io.ReadAll(io.LimitReader(out.Content, maxItem+1))
	if err == nil && len(b) > maxItem {
		err = fmt.Errorf("longer than %d bytes", maxItem)
	}
	if err != nil {
		r.err = fmt.Errorf("read metadata %s: %w", path, err)
		return ""
	}
	return strings.TrimSpace(string(b))
}

// list reads an item with one value per line.
func list[T any](r *reader, path string, parse func(string) (T, error)) []T {
	var out []T
	for _, line := range strings.Fields(r.text(path)) {
		v, err := parse(line)
		if err != nil {
			r.err = fmt.Errorf("read metadata %s: %w", path, err)
			return nil
		}
		out = append(out, v)
	}
	return out
}

func first[T any](s []T) (v T) {
	if len(s) > 0 {
		return s[0]
	}
	return v
}

func isNotFound(err error) bool {
	var resp *smithyhttp.ResponseError
	return errors.As(err, &resp) && resp.HTTPStatusCode() == http.StatusNotFound
}
