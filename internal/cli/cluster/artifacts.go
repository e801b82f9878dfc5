package cluster

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// ReadArtifacts returns what is in a folder with programs in bin and image
// tarballs in images, as a build leaves them.
func ReadArtifacts(ctx context.Context, dir string) (Artifacts, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Artifacts{}, err
	}
	a := Artifacts{Bin: filepath.Join(dir, "bin")}
	out, err := exec.CommandContext(ctx, filepath.Join(a.Bin, "kubelet"), "--version").Output()
	if err != nil {
		return a, fmt.Errorf("ask the kubelet in %s for its version: %w", a.Bin, err)
	}
	a.Version = strings.TrimPrefix(strings.TrimSpace(string(out)), "Kubernetes ")
	tars, err := filepath.Glob(filepath.Join(dir, "images", "*.tar"))
	if err != nil {
		return a, err
	}
	for _, t := range tars {
		refs, err := imageNames(t)
		if err != nil {
			return a, fmt.Errorf("read image %s: %w", t, err)
		}
		for _, ref := range refs {
			a.Images = append(a.Images, Image{Ref: ref, Tar: t})
		}
	}
	return a, nil
}

// imageNames reads the names in the index of an OCI layout tarball.
func imageNames(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil, errors.New("it has no index.json: it is no OCI layout")
		}
		if err != nil {
			return nil, err
		}
		if filepath.Clean(h.Name) != "index.json" {
			continue
		}
		var index struct {
			Manifests []struct {
				Annotations map[string]string `json:"annotations"`
			} `json:"manifests"`
		}
		if err := json.NewDecoder(r).Decode(&index); err != nil {
			return nil, err
		}
		var names []string
		for _, m := range index.Manifests {
			// What containerd calls an image that it imports.
			if n := m.Annotations["io.containerd.image.name"]; n != "" {
				names = append(names, n)
			}
		}
		return names, nil
	}
}
