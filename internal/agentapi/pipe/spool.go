package pipe

import (
	"errors"
	"strings"
	"syscall"
)

// SpoolDir returns the directory, beside the agent's socket, in which the plugin
// leaves the releases that found no agent. A lost entry loses no safety: the
// address stays taken until CNI's GC or the namespace's end tells of it.
func SpoolDir(socket string) string { return socket + ".spool" }

// NewPrefix begins the name of a spool entry that is being written.
const NewPrefix = ".new-"

var errSpoolName = errors.New("the container ID or the interface name cannot be kept")

// Spool leaves a release for the agent's next start, in the form of its
// agentapi.Attachment. It is safe to repeat and to be killed in: an entry is
// there whole or not at all.
func Spool(socket, containerID, ifName string) error {
	// What a runtime may name is narrower; this is what a file name bears.
	if containerID == "" || len(containerID) > 128 || ifName == "" || len(ifName) > 15 || strings.ContainsAny(containerID+ifName, "/\x00") || containerID[0] == '.' {
		return errSpoolName
	}
	dir := SpoolDir(socket)
	if err := syscall.Mkdir(dir, 0o700); err != nil && err != syscall.EEXIST {
		return err
	}
	body := append([]byte(nil), `{"containerId":`...)
	body = AppendQuoted(body, containerID)
	body = append(body, `,"ifName":`...)
	body = append(AppendQuoted(body, ifName), '}')

	// One name per attachment: two that release the same write the same.
	name := containerID + ":" + ifName
	tmp := dir + "/" + NewPrefix + name
	fd, err := syscall.Open(tmp, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_TRUNC|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	n, err := syscall.Write(fd, body)
	if closeErr := syscall.Close(fd); err == nil {
		err = closeErr
	}
	if err == nil && n < len(body) {
		err = syscall.ENOSPC
	}
	if err == nil {
		err = syscall.Rename(tmp, dir+"/"+name)
	}
	if err != nil {
		_ = syscall.Unlink(tmp)
	}
	return err
}
