package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// ManagedService is a service that runs outside all instances, behind a
// requester-managed interface: a database, say.
type ManagedService struct {
	Name        string // [a-z][a-z0-9-]{0,19}
	Kind        ServiceKind
	Subnet      vpc.SubnetID
	Groups      []vpc.SecurityGroupID // none: the default group of the VPC
	Description string                // "" is what AWS writes
}

// ServiceKind says what a managed service is; "" is Database.
type ServiceKind string

// The kinds of managed services, whose interfaces look as RDS's and as those of
// a Network Load Balancer do.
const (
	Database     ServiceKind = "database"
	LoadBalancer ServiceKind = "load-balancer"
)

// requesters are who makes the interfaces.
var requesters = map[ServiceKind]string{Database: "amazon-rds", LoadBalancer: "amazon-elb"}

// KindOf tells what is behind the interface of a managed service.
func KindOf(e *store.ENI) ServiceKind {
	if e.RequesterID == requesters[LoadBalancer] {
		return LoadBalancer
	}
	return Database
}

var serviceName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,19}$`)

// CreateManagedService makes a managed service with its interface, which is
// attached at once to the service and which nobody but DeleteManagedService may
// change. Errors are *query.Error.
func (a *API) CreateManagedService(_ context.Context, m ManagedService) (*store.ENI, error) {
	if !serviceName.MatchString(m.Name) {
		return nil, query.Errorf("InvalidParameterValue", "The name %q of a managed service is not of the form %s", m.Name, serviceName)
	}
	m.Kind = cmp.Or(m.Kind, Database)
	requester, ok := requesters[m.Kind]
	if !ok {
		return nil, query.Errorf("InvalidParameterValue", "There is no managed service of kind %q. Give %s or %s.", m.Kind, Database, LoadBalancer)
	}
	if m.Description == "" {
		m.Description = "RDSNetworkInterface"
		if m.Kind == LoadBalancer {
			id := strings.TrimPrefix(vpc.NewID("lb"), "lb-")
			m.Description = "ELB net/" + m.Name + "/" + id[:16]
		}
	}
	s, err := parseSpec(wanted{}, collect(m.Groups, func(g vpc.SecurityGroupID) string { return string(g) }), &m.Description, nil)
	if err != nil {
		return nil, err
	}
	var e *store.ENI
	_, err = a.update(func(tx *store.Tx) error {
		if _, ok := tx.Services.Get(m.Name); ok {
			return query.Errorf("InvalidParameterValue", "There is a managed service %q already. Delete it, or choose another name.", m.Name)
		}
		n, err := findSubnet(&tx.State, string(m.Subnet))
		if err != nil {
			return err
		}
		if e, err = a.makeENI(tx, n, s); err != nil {
			return err
		}
		e.RequesterManaged, e.RequesterID, e.Service = true, requester, m.Name
		e.Attachment = a.attachmentOf("", 0, 1, false)
		e.Attachment.InstanceOwner, e.Attachment.Status = requester, store.Attached
		e.Attachment.Due = time.Time{}
		tx.PutENI(e)
		tx.PutService(&store.Service{Name: m.Name, ENI: e.ID, RequesterID: requester, Description: m.Description})
		return nil
	})
	return e, err
}

// ErrNoService says that there is no managed service of a name.
var ErrNoService = errors.New("no such managed service")

// DeleteManagedService removes a managed service and its interface. It returns
// ErrNoService when there is none of the name.
func (a *API) DeleteManagedService(_ context.Context, name string) error {
	_, err := a.update(func(tx *store.Tx) error {
		s, ok := tx.Services.Get(name)
		if !ok {
			names := slices.Collect(func(yield func(string) bool) {
				for n := range tx.Services.All() {
					if !yield(n) {
						return
					}
				}
			})
			return fmt.Errorf("%w: %q; there are %s", ErrNoService, name, quoted(names))
		}
		tx.DeleteENI(s.ENI)
		tx.DeleteService(name)
		return nil
	})
	return err
}
