package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"
)

// wait looks again and again until the probe succeeds or ctx ends. What was
// wrong is told, when tell is given, and is in the error.
func (p *Probe) wait(ctx context.Context, tell func(error)) error {
	last := ""
	for {
		lctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := p.look(lctx)
		cancel()
		if err == nil {
			return nil
		}
		if tell != nil && err.Error() != last {
			last = err.Error()
			tell(err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", context.Cause(ctx), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (p *Probe) look(ctx context.Context) error {
	network, address := "tcp", p.TCP
	switch {
	case p.HTTPS != "":
		return p.get(ctx)
	case p.Unix != "":
		network, address = "unix", p.Unix
	}
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	return c.Close()
}

func (p *Probe) get(ctx context.Context) error {
	ca, err := os.ReadFile(p.CA)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return errors.New(p.CA + " holds no certificate")
	}
	t := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}
	defer t.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.HTTPS, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", p.HTTPS, resp.Status)
	}
	return nil
}
