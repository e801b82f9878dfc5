package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/vpcd"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
)

func chaosCommand() *cobra.Command {
	var endpoint string
	c := &cobra.Command{
		Use:   "chaos",
		Short: "Make a running vpcd slow, stale or unreliable",
		Long: `Make the API of a running vpcd as slow, as stale and as unreliable as the real
one may be. The settings are in force at once, and until vpcd ends.`,
	}
	fallback := cmp.Or(os.Getenv("AWS_ENDPOINT_URL_EC2"), os.Getenv("AWS_ENDPOINT_URL"), "http://"+defaultListen)
	c.PersistentFlags().StringVar(&endpoint, "endpoint", fallback, "URL of the vpcd; its default is AWS_ENDPOINT_URL_EC2 or AWS_ENDPOINT_URL, if set")
	c.AddCommand(chaosSetCommand(&endpoint), chaosShowCommand(&endpoint), chaosResetCommand(&endpoint))
	return c
}

func chaosSetCommand(endpoint *string) *cobra.Command {
	var given chaos.Settings
	var fail, quota []string
	var output string
	c := &cobra.Command{
		Use:   "set",
		Short: "Change settings; those whose flags are not given stay",
		Long: `Change settings; those whose flags are not given stay as they are.

--fail ACTION=CODE:COUNT fails the next COUNT calls of an action with an error code;
--fail ACTION=CODE:PROBABILITY (with a point, as in 0.1 or 1.0) fails each call with
that probability. * is every action. Of several, the first that applies decides;
those given replace those there were, and --fail none removes them.

--quota NAME=N sets a quota of the account; those given replace those there were,
and --quota none returns to what AWS gives an account to begin with. There are
` + strings.Join(chaos.QuotaNames(), ", ") + `.`,
		Example: `  # the pace of a real region
  vpcd chaos set --latency 50ms --attach-latency 1s --imds-lag 500ms --throttle aws

  # three internal errors, then all is well
  vpcd chaos set --fail AssignPrivateIpAddresses=InternalError:3

  # an account that may have no more than eight network interfaces in a zone
  vpcd chaos set --quota interfaces-per-zone=8

  # a tenth of all calls throttled, and no ENI to be had
  vpcd chaos set --fail CreateNetworkInterface=NetworkInterfaceLimitExceeded:1.0 --fail '*=RequestLimitExceeded:0.1'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			changed := cmd.Flags().Changed
			apply := []func(s *chaos.Settings){}
			for name, set := range map[string]func(s *chaos.Settings){
				"latency":        func(s *chaos.Settings) { s.Latency = given.Latency },
				"attach-latency": func(s *chaos.Settings) { s.AttachLatency = given.AttachLatency },
				"imds-lag":       func(s *chaos.Settings) { s.IMDSLag = given.IMDSLag },
				"mapping-lag":    func(s *chaos.Settings) { s.MappingLag = given.MappingLag },
				"read-lag":       func(s *chaos.Settings) { s.ReadLag = given.ReadLag },
				"flow-interval":  func(s *chaos.Settings) { s.FlowInterval = given.FlowInterval },
				"file-interval":  func(s *chaos.Settings) { s.FileInterval = given.FileInterval },
				"fresh-reads":    func(s *chaos.Settings) { s.FreshReads = given.FreshReads },
				"throttle":       func(s *chaos.Settings) { s.Throttle = given.Throttle },
				"addresses":      func(s *chaos.Settings) { s.Addresses = given.Addresses },
				"quota":          func(s *chaos.Settings) { s.Quotas = given.Quotas },
				"fail":           func(s *chaos.Settings) { s.Fail = given.Fail },
			} {
				if changed(name) {
					apply = append(apply, set)
				}
			}
			if len(apply) == 0 {
				return errors.New("chaos set changes the settings whose flags are given: give one, as in --latency 50ms")
			}
			for _, f := range fail {
				if f == "none" && len(fail) == 1 {
					break
				}
				one, err := chaos.ParseFailure(f)
				if err != nil {
					return err
				}
				given.Fail = append(given.Fail, one)
			}
			for _, q := range quota {
				if q == "none" && len(quota) == 1 {
					break
				}
				name, n, err := chaos.ParseQuota(q)
				if err != nil {
					return err
				}
				if given.Quotas == nil {
					given.Quotas = map[chaos.Quota]int{}
				}
				given.Quotas[name] = n
			}
			settings, err := callChaos(cmd.Context(), *endpoint, http.MethodGet, nil)
			if err != nil {
				return err
			}
			for _, set := range apply {
				set(settings)
			}
			if err := settings.Validate(); err != nil {
				return err
			}
			if settings, err = callChaos(cmd.Context(), *endpoint, http.MethodPut, settings); err != nil {
				return err
			}
			return printChaos(cmd, output, settings)
		},
	}
	f := c.Flags()
	f.DurationVar(&given.Latency, "latency", 0, "added to each API call, as in 50ms")
	f.DurationVar(&given.AttachLatency, "attach-latency", 0, "from AttachNetworkInterface to the interface in the instance, as in 1s")
	f.DurationVar(&given.IMDSLag, "imds-lag", 0, "IMDS tells what was true so long ago, as in 500ms")
	f.DurationVar(&given.MappingLag, "mapping-lag", 0, "an address reaches its ENI on the wire so much later")
	f.DurationVar(&given.ReadLag, "read-lag", 0, "Describe calls tell what was true so long ago")
	f.DurationVar(&given.FlowInterval, "flow-interval", 0, "a flow record is of so long at most, 1s or more; 0 is what serve was told")
	f.DurationVar(&given.FileInterval, "file-interval", 0, "the files of flow logs are written so often, 1s or more; 0 is what serve was told")
	f.Float64Var(&given.FreshReads, "fresh-reads", 0, "share of Describe calls, 0 to 1, that tell the present in spite of --read-lag, as from another server")
	f.StringVar(&given.Throttle, "throttle", chaos.ThrottleOff, "aws (the token buckets of the real API) or off")
	f.StringVar(&given.Addresses, "addresses", chaos.AddressesLowest, "which free addresses and prefixes EC2 gives: lowest or scattered")
	f.StringArrayVar(&quota, "quota", nil, "NAME=N, repeatable; none")
	f.StringArrayVar(&fail, "fail", nil, "ACTION=CODE:COUNT or ACTION=CODE:PROBABILITY, repeatable; none")
	outputFlag(c, &output)
	return c
}

func chaosShowCommand(endpoint *string) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:     "show",
		Short:   "Show the settings",
		Example: "  vpcd chaos show -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := callChaos(cmd.Context(), *endpoint, http.MethodGet, nil)
			if err != nil {
				return err
			}
			return printChaos(cmd, output, s)
		},
	}
	outputFlag(c, &output)
	return c
}

func chaosResetCommand(endpoint *string) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:     "reset",
		Short:   "Return to good behaviour",
		Example: "  vpcd chaos reset",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := callChaos(cmd.Context(), *endpoint, http.MethodDelete, nil)
			if err != nil {
				return err
			}
			return printChaos(cmd, output, s)
		},
	}
	outputFlag(c, &output)
	return c
}

func printChaos(cmd *cobra.Command, output string, s *chaos.Settings) error {
	return printData(cmd.OutOrStdout(), output, s, func(w io.Writer) {
		t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
		fmt.Fprintf(t, "latency\t%v\nattach-latency\t%v\nimds-lag\t%v\nmapping-lag\t%v\nread-lag\t%v\nflow-interval\t%v\nfile-interval\t%v\nfresh-reads\t%v\nthrottle\t%s\naddresses\t%s\n",
			s.Latency, s.AttachLatency, s.IMDSLag, s.MappingLag, s.ReadLag, s.FlowInterval, s.FileInterval, s.FreshReads, s.Throttle, s.Addresses)
		for _, q := range slices.Sorted(maps.Keys(s.Quotas)) {
			fmt.Fprintf(t, "quota\t%s=%d\n", q, s.Quotas[q])
		}
		if len(s.Quotas) == 0 {
			fmt.Fprintln(t, "quota\tnone")
		}
		for _, f := range s.Fail {
			fmt.Fprintf(t, "fail\t%s\n", f)
		}
		if len(s.Fail) == 0 {
			fmt.Fprintln(t, "fail\tnone")
		}
		_ = t.Flush() // a terminal that is gone does not mind
	})
}

// callChaos calls the chaos endpoint of a vpcd and returns the settings that it
// answers.
func callChaos(ctx context.Context, endpoint, method string, body *chaos.Settings) (*chaos.Settings, error) {
	base, err := url.Parse(endpoint)
	if err != nil || base.Scheme != "http" && base.Scheme != "https" || base.Host == "" {
		return nil, fmt.Errorf("--endpoint %q: give a URL as in http://%s", endpoint, defaultListen)
	}
	var payload bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&payload).Encode(body); err != nil {
			return nil, fmt.Errorf("encode the settings: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, base.JoinPath(vpcd.AdminPath, "chaos").String(), &payload)
	if err != nil {
		return nil, fmt.Errorf("ask vpcd: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("no vpcd answers at %s: start one with vpcd serve (or underlay up), or say where it is with --endpoint", endpoint)
	case err != nil:
		return nil, fmt.Errorf("ask vpcd: %w; is --endpoint right?", err)
	}
	defer func() { _ = resp.Body.Close() }() // read to its end, or worthless
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("read vpcd's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		var e struct{ Error string }
		if json.Unmarshal(b, &e) == nil && e.Error != "" {
			return nil, errors.New(e.Error)
		}
		return nil, fmt.Errorf("%s is no vpcd: it answers %s", endpoint, resp.Status)
	}
	var s chaos.Settings
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("%s is no vpcd of this version: %w", endpoint, err)
	}
	return &s, nil
}
