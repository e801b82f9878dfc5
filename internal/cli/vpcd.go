package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
)

// admin is vpcd's own interface, beside the EC2 API on the same address.
type admin struct {
	endpoint string // "http://127.0.0.1:7424"
	client   http.Client
}

func newAdmin(endpoint string) *admin {
	return &admin{
		endpoint: endpoint,
		// A proxy of the person's environment has no business here.
		client: http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
			DialContext: (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
		}},
	}
}

func (a *admin) do(ctx context.Context, method, path string, in, out any) error {
	what := method + " " + a.endpoint + "/_vpcd/" + path
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.endpoint+"/_vpcd/"+path, body)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return fmt.Errorf("ask vpcd: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s: %s: %s", what, resp.Status, shorten(strings.TrimSpace(string(b)), 500))
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("%s: decode the answer: %w", what, err)
	}
	return nil
}

// health returns nil when the vpcd of this lab serves.
func (a *admin) health(ctx context.Context, lab string) error {
	var h struct {
		Status string   `json:"status"`
		Name   string   `json:"name"`
		Errors []string `json:"errors"`
	}
	if err := a.do(ctx, http.MethodGet, "health", nil, &h); err != nil {
		return err
	}
	if h.Name != lab {
		return fmt.Errorf("what answers at %s is vpcd of another lab, %q", a.endpoint, h.Name)
	}
	if h.Status != "ok" || len(h.Errors) > 0 {
		return fmt.Errorf("vpcd says that it is %q: %s", h.Status, strings.Join(h.Errors, "; "))
	}
	return nil
}

type adminInstance struct {
	InstanceID string `json:"instanceId"`
	Name       string `json:"name"`
	Netns      string `json:"netns"`
	State      string `json:"state"`
}

func (a *admin) instances(ctx context.Context) ([]adminInstance, error) {
	var all []adminInstance
	return all, a.do(ctx, http.MethodGet, "instances", nil, &all)
}

// startVPCD starts vpcd and waits until it serves.
func startVPCD(ctx context.Context, h home, vpcd, listen string) error {
	cmd := newCommand(vpcd, "serve", "--name", h.name, "--dir", h.vpcd(), "--bpffs", h.bpf("vpcd"), "--listen", listen, "--region", region)
	if exists(h.iamPolicy()) {
		cmd.Args = append(cmd.Args, "--iam-policy", nodeKey+"="+h.iamPolicy())
	}
	cmd.Env = cleanEnv()
	p, exited, err := background(cmd, "", h.vpcdLog())
	if err != nil {
		return err
	}
	if err := writeJSON(h.vpcdPID(), p); err != nil {
		return err
	}
	return whileAlive(ctx, "vpcd", exited, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("vpcd did not become healthy within a minute"))
		defer cancel()
		if err := poll(ctx, 10*time.Millisecond, func() (bool, error) {
			return newAdmin("http://"+listen).health(ctx, h.name) == nil, nil
		}); err != nil {
			return fmt.Errorf("wait for vpcd: %w", err)
		}
		return nil
	})
}

// restart kills a process that the whole lab has one of, as a crash would, has
// start start it anew, and says how long that took. log names its log, dir is where
// kill locks.
func (a *App) restart(ctx context.Context, h home, what, log, dir, pid string, start func(context.Context) error) error {
	l, err := h.lockLab(ctx, false)
	if err != nil {
		return err
	}
	defer l.release("")
	unlock, err := kill(ctx, dir, pid)
	if err != nil {
		return fmt.Errorf("restart %s: %w", what, err)
	}
	defer unlock()
	began := a.now()
	if err := start(ctx); err != nil {
		return fmt.Errorf("restart %s: %w; see: underlay logs %s%s", what, err, log, a.labFlag())
	}
	took := a.now().Sub(began)
	p, err := readProc(pid)
	if err != nil {
		return err
	}
	out := struct {
		PID    int     `json:"pid"`
		Millis float64 `json:"millis"`
	}{p.PID, millis(took)}
	return a.print(out, func(w io.Writer) {
		fmt.Fprintf(w, "%s serves again after %s (process %d)\n", what, seconds(took), p.PID)
	})
}

func (a *App) vpcdCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "vpcd",
		Short: "Work on the VPC itself: restart it, make it slow or fail",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(&cobra.Command{
		Use:   "restart",
		Short: "Kill vpcd (SIGKILL) and start it anew",
		Long: `Kills vpcd as a crash would, and starts it anew at the same address. Packets go on
meanwhile: the fabric is the kernel's. No acknowledged call is lost.`,
		Example:     "  underlay vpcd restart",
		Args:        cobra.NoArgs,
		Annotations: rootBecause("starts vpcd, which makes network namespaces"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			h := a.home()
			f, err := h.loadUp()
			if err != nil {
				return err
			}
			vpcd, err := program("vpcd")
			if err != nil {
				return err
			}
			return a.restart(cmd.Context(), h, "vpcd", "vpcd", h.vpcd(), h.vpcdPID(), func(ctx context.Context) error {
				return startVPCD(ctx, h, vpcd, strings.TrimPrefix(f.Lab.Endpoint, "http://"))
			})
		},
	})
	c.AddCommand(&cobra.Command{
		Use:   "chaos set|show|reset [-- FLAGS…]",
		Short: "Make the lab's EC2 slow, stale or failing",
		Long:  "Runs vpcd chaos on this lab's vpcd; its flags go after --. See: vpcd chaos set --help",
		Example: `  underlay vpcd chaos set -- --latency 50ms --attach-latency 1s
  underlay vpcd chaos set -- --fail AssignPrivateIpAddresses=InsufficientFreeAddressesInSubnet:3
  underlay vpcd chaos reset`,
		Args:      cobra.MinimumNArgs(1),
		ValidArgs: []string{"set", "show", "reset"},
		RunE: func(_ *cobra.Command, args []string) error {
			f, err := a.home().loadUp()
			if err != nil {
				return err
			}
			vpcd, err := program("vpcd")
			if err != nil {
				return err
			}
			argv := append([]string{vpcd, "chaos"}, args...)
			if err := unix.Exec(vpcd, append(argv, "--endpoint", f.Lab.Endpoint), os.Environ()); err != nil {
				return fmt.Errorf("run %s: %w", vpcd, err)
			}
			return nil
		},
	})
	return c
}

// checkFree returns an error when address cannot be listened on.
func checkFree(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("%w; choose another with --listen, or leave the flag out and a free one is found", err)
	}
	return l.Close()
}

// freeListen returns want when it can be listened on, else an address on
// another free port of the same host. The port may be taken by another program
// before vpcd has it; vpcd then says so.
func freeListen(want string) (string, error) {
	l, err := nl.Listen(want)
	if err != nil {
		host, _, serr := net.SplitHostPort(want)
		if serr != nil {
			return "", fmt.Errorf("read the address %q: %w", want, serr)
		}
		if l, err = nl.Listen(net.JoinHostPort(host, "0")); err != nil {
			return "", fmt.Errorf("find a free port: %w", err)
		}
	}
	defer l.Close()
	return l.Addr().String(), nil
}
