package install

import (
	"debug/buildinfo"
	"strconv"
	"strings"
)

// speaks110 reports whether a plugin of the CNI project speaks version 1.1.0 of
// the specification, as its build says: the project's library does from v1.2.0
// on. The plugin is not asked: it need not run where the agent does, in an
// image without its libraries. Builds that do not tell, as Debian's, count as
// older.
func speaks110(plugin string) bool {
	info, err := buildinfo.ReadFile(plugin)
	if err != nil {
		return false
	}
	for _, dep := range info.Deps {
		if dep.Path == "github.com/containernetworking/cni" {
			if dep.Replace != nil {
				dep = dep.Replace
			}
			return atLeast12(dep.Version)
		}
	}
	return false
}

// atLeast12 reports whether a module's version is v1.2 or later; a pre-release
// of it counts.
func atLeast12(version string) bool {
	major, rest, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	minor, _, _ := strings.Cut(rest, ".")
	m, err := strconv.Atoi(major)
	n, err2 := strconv.Atoi(minor)
	return err == nil && err2 == nil && (m > 1 || m == 1 && n >= 2)
}
