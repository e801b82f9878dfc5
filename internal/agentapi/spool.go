package agentapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
)

// DrainSpool hands each release that the plugin left (pipe.Spool) to fn and
// removes it once fn returned nil. An entry that cannot be read is removed and reported.
func DrainSpool(socket string, fn func(Attachment) error) error {
	dir := pipe.SpoolDir(socket)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the spool: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), pipe.NewPrefix) {
			continue // somebody writes it, or died doing so
		}
		file := filepath.Join(dir, e.Name())
		b, err := os.ReadFile(file)
		if err != nil {
			errs = append(errs, fmt.Errorf("read a spooled release: %w", err))
			continue
		}
		var a Attachment
		if err := json.Unmarshal(b, &a); err != nil || a.ContainerID == "" || a.IfName == "" {
			errs = append(errs, fmt.Errorf("drop the unreadable spooled release %s", file))
		} else if err := fn(a); err != nil {
			errs = append(errs, fmt.Errorf("release %s/%s: %w", a.ContainerID, a.IfName, err))
			continue
		}
		if err := os.Remove(file); err != nil {
			errs = append(errs, fmt.Errorf("remove a spooled release: %w", err))
		}
	}
	return errors.Join(errs...)
}
