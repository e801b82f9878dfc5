package runtimes

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"github.com/underlay-cni/underlay/internal/oci"
	"github.com/underlay-cni/underlay/test/lab"
)

// imageName is what the runtimes know the image by: a whole name, since
// containerd completes none.
const imageName = "docker.io/underlay/peer:test"

// buildImage writes an image of one static program, peer, which runs as a server
// unless told otherwise, into an archive that every runtime loads without a
// registry: /run/bin/peer.tar of every machine.
var buildImage = sync.OnceValue(func() error { return writeImage(lab.Bin) })

func writeImage(dir string) error {
	program := filepath.Join(dir, "peer")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./peer")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build peer: %w\n%s", err, out)
	}
	var files oci.Tree
	if err := files.File("/peer", 0o755, program); err != nil {
		return err
	}
	image, err := oci.New(oci.Config{Entrypoint: []string{"/peer"}, Cmd: []string{"serve"}}, oci.Platform{Files: &files})
	if err != nil {
		return err
	}
	return image.WriteArchive(filepath.Join(dir, "peer.tar"), imageName)
}
