// Package oci makes container images out of files and writes them as archives
// that every runtime imports, without a registry, a container engine or root.
//
//	Tree (files, links)  ──New──▶  Image (one platform or several)  ──WriteArchive──▶  file.tar
//
// Invariants: an image depends on the names, modes and contents of its files and
// on its configuration alone. Owner is root, every time is the Unix epoch and
// entries stand in the order of their names, so that equal files give an equal
// digest on every machine. An archive is there whole or not at all (rename).
//
// The form is the OCI image layout in a tar file: "ctr images import",
// "podman load" and "skopeo copy oci-archive:" read it. A Tree is not safe for
// concurrent use; an Image is.
package oci
