package agentapi

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// SpoolDir returns the directory, beside the agent's socket, in which the plugin
// leaves the releases that found no agent. A lost entry loses no safety: the
// address stays taken until CNI's GC or the namespace's end tells of it.
func SpoolDir(socket string) string { return socket + ".spool" }

// Spool leaves a release for the agent's next start. It is safe to repeat and to
// be killed in: an entry is there whole or not at all.
func Spool(socket string, a Attachment) error {
	dir := SpoolDir(socket)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the spool: %w", err)
	}
	b, err := json.Marshal(&a)
	if err != nil {
		return fmt.Errorf("encode the release: %w", err)
	}
	tmp, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return fmt.Errorf("spool the release: %w", err)
	}
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Close()); err == nil {
		// Container IDs come from outside and may hold what a file name may
		// not. 128 + 1 + 15 bytes become 192, and a file name may have 255.
		name := base64.RawURLEncoding.EncodeToString([]byte(a.ContainerID + "/" + a.IfName))
		err = os.Rename(tmp.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return fmt.Errorf("spool the release: %w", err)
	}
	return nil
}

// DrainSpool hands each spooled release to fn and removes it once fn returned
// nil. An entry that cannot be read is removed and reported.
func DrainSpool(socket string, fn func(Attachment) error) error {
	dir := SpoolDir(socket)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the spool: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".new-") {
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
