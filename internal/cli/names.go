package cli

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

const defaultLab = "demo"

var (
	labForm = regexp.MustCompile(`^[a-z][a-z0-9]*(-[a-z0-9]+)*$`)
	podForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
)

// kinds are what may follow the lab's name in the name of a network namespace:
// ul-LAB-fabric, ul-LAB-i-0123…, ul-LAB-svc-NAME, ul-LAB-pod-NAME. A lab's own
// name must not contain one as a word after its first, or the namespaces of
// two labs could not be told apart.
var kinds = []string{"fabric", "i", "svc", "pod"}

// CheckLab reports why name cannot name a lab.
func CheckLab(name string) error {
	if len(name) > 20 || !labForm.MatchString(name) {
		return fmt.Errorf("%q cannot name a lab: use at most 20 lower-case letters, digits and single dashes, the first a letter", name)
	}
	for _, word := range strings.Split(name, "-")[1:] {
		if slices.Contains(kinds, word) {
			return fmt.Errorf("%q cannot name a lab: %q after a dash is how its network namespaces are told apart; choose another name", name, word)
		}
	}
	return nil
}

// CheckPod reports why name cannot name a pod. The form is that of a
// Kubernetes pod whose name is a DNS label (RFC 1123).
func CheckPod(name string) error {
	if len(name) > 63 || !podForm.MatchString(name) {
		return fmt.Errorf("%q cannot name a pod: use at most 63 lower-case letters, digits and dashes, a letter or digit at both ends", name)
	}
	return nil
}

// labOfNetns returns the lab that a network namespace belongs to, by its name,
// and what it is there: "fabric", "i", "svc" or "pod", with its own name.
func labOfNetns(netns string) (lab, kind, name string, ok bool) {
	rest, ok := strings.CutPrefix(netns, "ul-")
	if !ok {
		return "", "", "", false
	}
	words := strings.Split(rest, "-")
	for i := 1; i < len(words); i++ {
		if !slices.Contains(kinds, words[i]) {
			continue
		}
		lab, kind, name = strings.Join(words[:i], "-"), words[i], strings.Join(words[i+1:], "-")
		if CheckLab(lab) != nil || (kind == "fabric") != (name == "") {
			return "", "", "", false
		}
		return lab, kind, name, true
	}
	return "", "", "", false
}
